"""A file of prompts by ``layerstream batch``: ``python -m layerstream.tools.benchmarks.batch CHECKPOINT FOLDER``.

Measures tokens per second over all prompts against a sample of them one after another, both bound by the same throttle;
then kills a run twice, resumes it, and compares its file with that of the run that nothing disturbed.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from layerstream.tools.console.arguments import positive_int

__all__ = ["main"]

_WORDS = (
    "the sea is wide and the night is long while a small boat looks for fish near an old bridge"
)
_SEED = 17
_POLL_SECONDS = 0.1


def main() -> int:
    """Run the benchmark and print its result as JSON; exit code 1 if the files differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint with a tokenizer")
    parser.add_argument("folder", type=Path, help="for the files of requests and answers")
    parser.add_argument("--prompts", type=positive_int, default=200, help="(default: 200)")
    parser.add_argument("--sample", type=positive_int, default=3, help="one by one (default: 3)")
    parser.add_argument("--new-tokens", type=positive_int, default=8, help="(default: 8)")
    parser.add_argument("--host", default="1GiB", help="the budget (default: 1GiB)")
    parser.add_argument("--throttle", default="200MB", help="bytes per second (default: 200MB)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    requests, sample = args.folder / "requests.jsonl", args.folder / "sample.jsonl"
    lines = _requests(args.prompts, new_tokens=args.new_tokens)
    requests.write_text("".join(lines), "utf-8")
    sample.write_text("".join(lines[: args.sample]), "utf-8")
    whole, killed = args.folder / "whole.jsonl", args.folder / "killed.jsonl"
    singly = _run(args, sample, args.folder / "singly.jsonl", "--at-once", "1")
    together = _run(args, requests, whole)
    kills = _killed_run(args, requests, killed, at=[args.prompts // 3, 2 * args.prompts // 3])
    same = whole.read_bytes() == killed.read_bytes()
    result = {
        "one_after_another": singly,
        "together": together,
        "times_faster": together["tokens_per_second"] / singly["tokens_per_second"],
        "answers_when_killed": kills,
        "same_file": same,
    }
    print(json.dumps(result, indent=2))
    return 0 if same else 1


def _requests(count: int, *, new_tokens: int) -> list[str]:
    rng, words = random.Random(_SEED), _WORDS.split()
    lines = []
    for number in range(count):
        prompt = " ".join(rng.choice(words) for _ in range(rng.randrange(2, 7)))
        body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        line = {"custom_id": f"{number}", "method": "POST", "url": "/v1/completions", "body": body}
        lines.append(json.dumps(line) + "\n")
    return lines


def _command(args: argparse.Namespace, source: Path, target: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "layerstream.tools.cli", "batch", str(args.path), str(source)]
    command += [str(target), "--device", "cpu", "--host", args.host, "--throttle", args.throttle]
    return [*command, *more]


def _run(args: argparse.Namespace, source: Path, target: Path, *more: str) -> dict[str, float]:
    """Answer all of ``source``, and return what the command says of it."""
    target.unlink(missing_ok=True)
    command = _command(args, source, target, *more)
    done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)  # noqa: S603 - our own
    last = done.stderr.splitlines()[-1]
    found = re.search(r"with (\d+) tokens in (\S+) s, (\d+) at once: \S+ tokens/s, (\d+) sw", last)
    if found is None:
        raise SystemExit(f"batch has said: {last}")
    tokens, seconds, at_once, sweeps = map(float, found.groups())
    print(last, file=sys.stderr)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "at_once": at_once,
        "sweeps": sweeps,
        "tokens_per_second": tokens / seconds,
    }


def _killed_run(
    args: argparse.Namespace, source: Path, target: Path, *, at: list[int]
) -> list[int]:
    """Kill the command when ``target`` has so many answers, and let the last run finish; returns what there was."""
    target.unlink(missing_ok=True)
    kills = []
    for count in at:
        process = subprocess.Popen(_command(args, source, target), stderr=subprocess.DEVNULL)  # noqa: S603 - our own
        while _answers(target) < count and process.poll() is None:
            time.sleep(_POLL_SECONDS)
        process.kill()
        process.wait()
        kills.append(_answers(target))
    subprocess.run(_command(args, source, target), check=True, stderr=subprocess.DEVNULL)  # noqa: S603 - our own
    return kills


def _answers(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


if __name__ == "__main__":
    sys.exit(main())
