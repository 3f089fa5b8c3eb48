"""Walking an NNX model through every container, by every path, and putting a new module where an old one was."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from qlora_jax.errors import UserError

Path = tuple[str, ...]


def walk(node: Any, path: Path = (), above: tuple[int, ...] = ()) -> Iterator[tuple[Path, Any]]:
    """Every module, variable and container from `node` downwards, once for each path that leads to it."""
    if id(node) in above:
        return
    below = children(node)
    if below or isinstance(node, nnx.Pytree | nnx.Variable):
        yield path, node
    for name, child in below:
        yield from walk(child, (*path, name), (*above, id(node)))


def children(node: Any) -> list[tuple[str, Any]]:
    """What a module's attributes or a container's entries hold; nothing for a leaf."""
    if isinstance(node, nnx.Pytree):
        return [(name, value) for name, value in vars(node).items() if not name.startswith("_pytree__")]
    if isinstance(node, dict):
        return [(str(key), value) for key, value in node.items()]
    if isinstance(node, nnx.Variable) or jax.tree_util.all_leaves([node]):
        return []
    entries, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda value: value is not node)
    return [(jax.tree_util.keystr(key, simple=True), value) for key, value in entries]


def replace_at(node: Any, path: Path, new: Any) -> Any:
    """Puts `new` at a path below `node`.

    Modules, lists and dicts change in place; tuples and other immutable containers are made anew, up to the first
    mutable one above them.

    Returns:
      `node`, or what takes its place.
    """
    if not path:
        return new
    entries = children(node)
    index = [name for name, _ in entries].index(path[0])
    old = entries[index][1]
    child = replace_at(old, path[1:], new)
    if child is old:
        return node
    if isinstance(node, nnx.Pytree):
        setattr(node, path[0], child)
    elif isinstance(node, list):
        node[index] = child
    elif isinstance(node, dict):
        node[list(node)[index]] = child
    else:
        values = [child if i == index else value for i, (_, value) in enumerate(entries)]
        treedef = jax.tree.structure(node, is_leaf=lambda value: value is not node)
        return jax.tree.unflatten(treedef, values)
    return node


def matching(path: Path, patterns: Sequence[str]) -> str | None:
    """The first pattern whose dotted components occur side by side in the path: `head` is not `attn_head`."""
    for pattern in patterns:
        parts = tuple(pattern.split("."))
        if any(path[i : i + len(parts)] == parts for i in range(len(path) - len(parts) + 1)):
            return pattern
    return None


def require_matches(patterns: Sequence[str], paths: Sequence[Path], what: str) -> None:
    """Refuses a pattern that matches none of the paths.

    Raises:
      UserError: naming the pattern as `what`, with some of the paths.
    """
    for pattern in patterns:
        if not any(matching(path, (pattern,)) for path in paths):
            seen = ", ".join(map(dotted, paths[:8])) + (", ..." if len(paths) > 8 else "")
            raise UserError(
                f"{what} {pattern!r} matches no layer", why=f"it is no whole dotted component of: {seen or 'nothing'}"
            )


def dotted(path: Path) -> str:
    """A path as users write it; the model itself is `(model)`."""
    return ".".join(path) or "(model)"
