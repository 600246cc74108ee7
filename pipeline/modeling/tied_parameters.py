"""Lists tied parameters once, though each of their places has a placeholder or table of its own."""

from collections.abc import Collection, Iterator

from torch import nn

__all__ = ["list_tied_once"]


def list_tied_once(root: nn.Module, aliases: Collection[str]) -> None:
    """Have ``named_parameters``, and what uses it (``parameters``, ``num_parameters``), list tied parameters once.

    torch leaves out what it has listed by identity. An embedding whose rows are gathered and a head that streams the same
    table are two objects, and were counted twice.

    Args:
        root: The module tree.
        aliases: The further names of tied parameters.
    """

    def named_parameters(
        prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        at = len(prefix) + 1 if prefix else 0
        for name, parameter in type(root).named_parameters(root, prefix, recurse, remove_duplicate):
            if not remove_duplicate or name[at:] not in aliases:
                yield name, parameter

    vars(root)["named_parameters"] = named_parameters
