"""Lists the public names of the running Python's standard library, as JSON lines on stdout.

Run as a script, in a process of its own: importing the whole standard library binds signal handlers, patches modules,
opens a terminal and prints (readline, cgitb, ctypes, lib2to3 …). It therefore imports nothing but the standard library.

One line per name: {"name", "kind", "module", "object", "doc"}; "object" numbers Python objects, so that two names of
one object can be told from two objects; "doc" is the docstring or null.
"""

import importlib
import inspect
import json
import os
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

# Left out: what acts when imported, test code, what is gone from newer Pythons, and what follows the platform or the
# build, so that two machines with the same Python agree as far as they can.
_ACTS_ON_IMPORT = {"antigravity", "this", "__main__"}
_TESTS_AND_DEMOS = {"idlelib", "test", "turtledemo", "pydoc_data"}
_LEAVING = {"lib2to3", "distutils", "ensurepip", "venv", "sre_compile", "sre_constants", "sre_parse"}
_PLATFORM = {"ntpath", "nt", "msilib", "posix", "genericpath", "nturl2path", "tkinter", "turtle", "encodings"}
_SKIPPED = _ACTS_ON_IMPORT | _TESTS_AND_DEMOS | _LEAVING | _PLATFORM
_SKIPPED_SUBMODULES = {"test", "tests", "windows_events", "windows_utils", "popen_spawn_win32"}
# The name under which people import it.
_RENAMED = {"posixpath": "os.path"}


def scan() -> Iterator[dict[str, Any]]:
    """Yields the public names of all modules, modules in name order, members in name order."""
    numbers: dict[int, int] = {}
    alive = []  # an object that is freed would hand its id to another one
    for module_name, module in sorted(_modules(), key=lambda item: item[0]):
        for name, kind, member in _members(module_name, module):
            alive.append(member)
            doc = getattr(member, "__doc__", None)
            yield {
                "name": name,
                "kind": kind,
                "module": module_name.partition(".")[0],
                "object": numbers.setdefault(id(member), len(numbers)),
                "doc": doc if isinstance(doc, str) else None,
            }


def _modules() -> Iterator[tuple[str, ModuleType]]:
    waiting = sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in _SKIPPED)
    while waiting:
        name = waiting.pop()
        module = _load(name)
        if module is None:
            continue
        yield _RENAMED.get(name, name), module
        for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
            if not found.name.startswith("_") and found.name not in _SKIPPED_SUBMODULES:
                waiting.append(f"{name}.{found.name}")


def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit):  # not built here, another platform's, or a script
        return None


def _members(module_name: str, module: ModuleType) -> Iterator[tuple[str, str, Any]]:
    """Yields (dotted name, kind, object) for a module, its functions and classes, and the classes' own members."""
    yield module_name, "module", module
    listed = getattr(module, "__all__", None)
    for name in sorted(set(dir(module) if listed is None else listed)):
        if name.startswith("_"):
            continue
        try:
            member = getattr(module, name)
        except Exception:  # listed in __all__ and absent here
            continue
        home = getattr(member, "__module__", None)
        if listed is None and isinstance(home, str) and home != module.__name__:
            continue  # imported from elsewhere
        if inspect.isclass(member):
            yield f"{module_name}.{name}", "class", member
            yield from _class_members(f"{module_name}.{name}", member)
        elif inspect.isroutine(member):
            yield f"{module_name}.{name}", "function", member


def _class_members(class_name: str, owner: type) -> Iterator[tuple[str, str, Any]]:
    for name, member in sorted(vars(owner).items(), key=lambda item: item[0]):
        if name.startswith("_"):
            continue
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if isinstance(member, property) or inspect.isgetsetdescriptor(member) or inspect.ismemberdescriptor(member):
            yield f"{class_name}.{name}", "property", member
        elif inspect.isroutine(member):
            yield f"{class_name}.{name}", "method", member


def main() -> None:
    # Imported C modules write to file descriptor 1 too (readline, on some terminals): keep it for ourselves.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        for entry in scan():
            answer.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
