"""Tries lm-evaluation-harness with its model ``local-completions``: its figures are those of transformers."""

import json
import os
from pathlib import Path
from typing import Any

from checking import CASE, check, run_checks

os.environ["OPENAI_API_KEY"] = CASE["key"]

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

EVALUATION = CASE["evaluation"]
ARGUMENTS = {
    "model": CASE["model"],
    "base_url": f"{CASE['url']}/v1/completions",
    "tokenizer": CASE["folder"],
    "tokenizer_backend": "huggingface",
    "tokenized_requests": True,
    "max_length": 512,
    "max_retries": 1,
    "num_concurrent": 2,
}


def _task(name: str, rows: list[dict[str, Any]], **settings: Any) -> str:
    """Write a task with data of its own, for nothing can be downloaded."""
    data = Path(f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **settings,
    }
    Path("tasks").mkdir(exist_ok=True)
    Path(f"tasks/{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return name


def _evaluate(task: str) -> Any:
    found = simple_evaluate(
        model="local-completions",
        model_args=ARGUMENTS,
        tasks=[task],
        task_manager=TaskManager(include_path="tasks", include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        random_seed=1,
    )
    return found["results"][task], found["samples"][task]


@check
def choices() -> None:
    """Log likelihoods of choices, and the accuracy from them."""
    task = _task(
        "choices",
        EVALUATION["questions"],
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}],
    )
    results, samples = _evaluate(task)
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    for sample, expected in zip(samples, EVALUATION["loglikelihoods"], strict=True):
        found = [float(response[0][0]) for response in sample["resps"]]
        assert all(abs(a - b) < 1e-3 for a, b in zip(found, expected, strict=True)), (
            found,
            expected,
        )
    assert results["acc,none"] == EVALUATION["accuracy"]


@check
def rolling() -> None:
    """The log likelihood of whole texts."""
    task = _task(
        "rolling",
        [{"text": text} for text in EVALUATION["texts"]],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    _, samples = _evaluate(task)
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    found = [float(sample["resps"][0][0]) for sample in samples]
    pairs = zip(found, EVALUATION["text_loglikelihoods"], strict=True)
    assert all(abs(a - b) < 1e-3 * abs(b) for a, b in pairs), found


@check
def generation() -> None:
    """Generated text."""
    task = _task(
        "generation",
        [{"question": CASE["completion"]["prompt"]}],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="a",
        metric_list=[{"metric": "bypass"}],
        generation_kwargs={
            "max_gen_toks": CASE["completion"]["max_tokens"],
            "temperature": 0,
            "until": ["\n\n\n\n"],
        },
    )
    _, samples = _evaluate(task)
    assert samples[0]["resps"] == [[CASE["completion"]["text"]]]


run_checks()
