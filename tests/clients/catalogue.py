"""The clients that are tried, with the versions that are installed."""

from dataclasses import dataclass

__all__ = ["CLIENTS", "Client"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A client, and the script that tries it."""

    script: str
    """A Python script, or one for node if it ends with ``.mjs``."""
    packages: tuple[str, ...]
    """What pip or npm installs."""

    @property
    def is_node(self) -> bool:
        """Whether it is JavaScript."""
        return self.script.endswith(".mjs")


CLIENTS = {
    "openai": Client(script="try_openai.py", packages=("openai==3.54.0",)),
    "openai-node": Client(script="try_openai.mjs", packages=("openai@6.49.0",)),
    "anthropic": Client(script="try_anthropic.py", packages=("anthropic==2.14.0",)),
    "litellm": Client(script="try_litellm.py", packages=("litellm==1.110.2",)),
    "langchain": Client(script="try_langchain.py", packages=("langchain-openai==1.7.4",)),
    "pydantic-ai": Client(
        script="try_pydantic_ai.py", packages=("pydantic-ai-slim[openai]==2.68.0",)
    ),
    "openai-agents": Client(script="try_openai_agents.py", packages=("openai-agents==0.24.0",)),
    "smolagents": Client(script="try_smolagents.py", packages=("smolagents[openai]==1.26.0",)),
    "llm": Client(script="try_llm.py", packages=("llm==0.36",)),
    "lm-eval": Client(
        script="try_lm_eval.py", packages=("lm-eval[api]==0.4.13", "transformers==5.24.0")
    ),
    "guidellm": Client(script="try_guidellm.py", packages=("guidellm==0.8.1",)),
    "codex": Client(script="try_codex.mjs", packages=("@openai/codex@0.171.0",)),
    "vercel": Client(
        script="try_vercel.mjs",
        packages=("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7"),
    ),
}
