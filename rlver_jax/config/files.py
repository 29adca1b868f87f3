"""Config files: `configs/` of this installation, and what `import configs` means in a config file.

`configs` is a usual name for a folder, and Python looks into the working folder first. The library therefore imports
no `configs`.
"""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel holds them within the package, a checkout beside it.
FOLDER = next((f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if f.is_dir()), _PACKAGE / "configs")
_NAME = "configs"
_FILE = "config_config"  # ml_collections' module of a config file: the next one would find what this one defined


def located(file: str) -> str:
    """The place of a config file: configs/NAME.py that the working folder doesn't have is that of the package."""
    if re.fullmatch(rf"(\./)?{_NAME}/\w+\.py", file) and not Path(file).exists() and (FOLDER.parent / file).exists():
        return str(FOLDER.parent / file)
    return file


def shipped() -> list[str]:
    """The config files of this installation, as --config takes them in any folder: configs/NAME.py."""
    return sorted(f"{_NAME}/{file.name}" for file in FOLDER.glob("[a-z]*.py"))


def missing(file: str) -> str:
    """What to say of a config file that isn't there."""
    known = {Path(name).stem: name for name in shipped()}
    if not file:
        return "is empty; name a Python file, such as configs/base.py"
    if Path(file).is_dir():
        return "is a folder; name a Python file, such as configs/base.py"
    close = difflib.get_close_matches(Path(file).stem, known, 1)
    hint = f"did you mean {known[close[0]]}?" if close else f"the package has {', '.join(known.values())}"
    return f"there is no such file; {hint}"


@contextlib.contextmanager
def imports_of(file: str) -> Iterator[None]:
    """Within it, `import configs` finds what a config file means by it, and nothing is changed afterwards.

    That is the folder that the file lies in, where it is called so; then the package's; then what Python would find.
    """
    folder = Path(file).absolute().parent
    folders = [folder] if folder.name == _NAME else []
    folders += [FOLDER, *(Path(entry or ".").absolute() / _NAME for entry in sys.path)]
    before = _set_aside()
    try:
        _make_package([str(path) for path in dict.fromkeys(folders) if path.is_dir()])
        yield
    finally:
        _set_aside()
        sys.modules.update(before)


def _set_aside() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.split(".")[0] in (_NAME, _FILE)]
    return {name: sys.modules.pop(name) for name in names}


def _make_package(folders: Sequence[str]) -> None:
    """`configs` with modules from several folders, and the __init__.py of the first one."""
    init = Path(folders[0]) / "__init__.py"
    if not init.exists():
        spec = importlib.machinery.ModuleSpec(_NAME, None, is_package=True)
        spec.submodule_search_locations = list(folders)
        sys.modules[_NAME] = importlib.util.module_from_spec(spec)
        return
    package_spec = importlib.util.spec_from_file_location(_NAME, init, submodule_search_locations=list(folders))
    assert package_spec is not None
    assert package_spec.loader is not None
    sys.modules[_NAME] = module = importlib.util.module_from_spec(package_spec)
    package_spec.loader.exec_module(module)
