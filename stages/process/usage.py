"""How much memory this process takes, as the kernel counts it."""

from pathlib import Path

__all__ = ["anonymous_bytes"]


def anonymous_bytes() -> int | None:
    """Anonymous memory of this process, page-locked memory included; None where unknown.

    Pages of mapped files do not count: the kernel takes them back when it needs them.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = dict(line.partition(":")[::2] for line in status.splitlines())
    return sum(
        int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem") if name in fields
    )
