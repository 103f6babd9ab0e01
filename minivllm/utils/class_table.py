"""Classes found by name: a literal table of ours, which plug-ins join by an ordinary call."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from minivllm.exceptions import ConfigError
from minivllm.utils.text import nearest

T = TypeVar("T")


class ClassTable(Generic[T]):
    """Names to "module:Class" (imported when asked for), or to classes. `option` is what its errors blame."""

    def __init__(self, option: str, base: str, targets: dict[str, str]) -> None:
        """base: "module:Class" of what every class here derives from."""
        self._option = option
        self._base = base
        self._targets: dict[str, str | type[T]] = dict(targets)

    @property
    def names(self) -> list[str]:
        return sorted(self._targets)

    def register(self, *names: str) -> Callable[[type[T]], type[T]]:
        """A decorator: the class is found by these names from now on."""

        def add(cls: type[T]) -> type[T]:
            self._targets.update(dict.fromkeys(names, cls))
            return cls

        return add

    def get(self, name: str) -> type[T]:
        """The class of a name.

        Raises:
            ConfigError: there is none; the error has the names there are.
        """
        target = self._targets.get(name)
        if target is None:
            hint = nearest(name, self._targets)
            known = f"did you mean {hint}?" if hint else f"there are {', '.join(self.names)}"
            raise ConfigError(f"{self._option} {name} is unknown; {known}")
        return _load(target) if isinstance(target, str) else target

    def import_plugin(self, path: str) -> None:
        """Run a Python file, which is to register classes.

        Raises:
            ConfigError: it cannot be run, or registers nothing that derives from the base.
        """
        if import_name(path) in sys.modules:
            return
        before = dict(self._targets)
        import_file(path, option=f"{self._option}-plugin")
        added = [target for name, target in self._targets.items() if before.get(name) is not target]
        base = _load(self._base)
        if not any(isinstance(target, type) and issubclass(target, base) for target in added):
            raise ConfigError(
                f"{self._option}-plugin {path} registers no subclass of {self._base.replace(':', '.')}; "
                "put the table's register(NAME) before its class"
            )


def import_file(path: str, *, option: str) -> Any:
    """The module that a Python file is; a second time it is not run again.

    Raises:
        ConfigError: there is no such file, or it fails.
    """
    file, name = Path(path).expanduser(), import_name(path)
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise ConfigError(f"{option} {path} is not a file; give the path of a Python file")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{option} {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file raises
        del sys.modules[name]
        raise ConfigError(f"{option} {path} fails: {type(error).__name__}: {error}") from error
    return module


def import_name(path: str) -> str:
    """The name of the module that a Python file becomes."""
    file = Path(path).expanduser().resolve()
    return f"minivllm_plugin_{file.stem}_{zlib.crc32(str(file).encode()):x}"


def _load(target: str) -> type:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
