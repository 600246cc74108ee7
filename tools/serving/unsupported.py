"""Parameters of OpenAI's API and of other servers that would change an answer, and that this one does not support."""

from collections.abc import Mapping
from typing import Any

__all__ = ["UNSUPPORTED"]

# By name, the values that have no effect; null never has one. A parameter that the other kind of request supports is here
# for this kind.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "best_of": (1,),
    "dimensions": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "input": (),
    "messages": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt": (),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "parallel_tool_calls": (True, False),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "beam_width": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "prompt_logprobs": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    # llama.cpp's and Ollama's
    "dry_multiplier": (0, 0.0),
    "dynatemp_range": (0, 0.0),
    "grammar": ("",),
    "json_schema": (),
    "mirostat": (0,),
    "options": ({},),
    "tfs_z": (1, 1.0),
    "top_n_sigma": (-1, -1.0),
    "typical_p": (1, 1.0),
    "xtc_probability": (0, 0.0),
}
