"""The messages of Core ML's file format and the writer of its weights, from coremltools, without the rest of that package.

coremltools itself takes seconds to import (PyTorch, scikit-learn, its converters), and prints warnings about what it finds.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lobit.errors import MissingPartError

PACKAGE = "coremltools"
ALIAS = "lobit_coreml_proto"
"""Name under which the messages are imported, so that Python does not import the package above them first."""


def _folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MissingPartError(f"{PACKAGE} is not installed: pip install 'lobit[coreml]'")
    return Path(found.origin).parent


def _load(name: str, path: Path, places: list[str] | None = None) -> ModuleType:
    if name not in sys.modules:
        found = importlib.util.spec_from_file_location(name, path, submodule_search_locations=places)
        assert found is not None and found.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(found)
        try:
            found.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def messages() -> tuple[Any, Any, Any]:
    """The modules with the messages of MIL programs, of models, and of the types of their inputs and outputs.

    Raises:
        MissingPartError: coremltools is not installed.
    """
    names = ("MIL_pb2", "Model_pb2", "FeatureTypes_pb2")
    folder = _folder() / "proto"
    _load(ALIAS, folder / "__init__.py", [str(folder)])
    mil, model, features = (importlib.import_module(f"{ALIAS}.{name}") for name in names)
    return mil, model, features


def blob_writer(path: Path) -> Any:
    """A writer of a new file of weights (coremltools `_BlobStorageWriter`), whose methods return where each array begins.

    Raises:
        MissingPartError: coremltools is not installed, or not with its compiled parts.
    """
    library = next(_folder().glob("libmilstoragepython*"), None)
    if library is None:
        raise MissingPartError(f"{PACKAGE} has no compiled writer of weights for this system: use Linux or macOS, and a wheel from PyPI")
    # Under its own name: a library of this kind can be loaded once in a process, and coremltools would load it too.
    return _load(f"{PACKAGE}.{library.name.partition('.')[0]}", library)._BlobStorageWriter(str(path))
