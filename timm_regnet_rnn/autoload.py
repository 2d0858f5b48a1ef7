"""Opt-in registration without an import line.

`enable` leaves a .pth file in site-packages, whose one line Python runs at every start. The line waits for
`import timm` and then imports this package, so that `timm.create_model('regnet_convlstm_50')` works in any program. It
imports nothing by itself, never raises, and removes its own file at the first start after an uninstall.
"""

import site
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import List, Optional

__all__ = ['enable', 'disable', 'enabled_in']

FILENAME = 'timm_regnet_rnn_autoload.pth'

# Runs at every interpreter start with `file`, the path of the .pth file. os and sys are already imported there.
# Programs ask `importlib.util.find_spec('timm')` long before they import it, if ever: the finder stays until timm has
# run. It asks the others while it is busy, in which other finders of its kind may ask it.
HOOK = """
try:
    import os, sys
    if any(n.startswith('timm_regnet_rnn-') and n.endswith('.dist-info') for n in os.listdir(os.path.dirname(file))):
        class Finder:
            busy = False
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name != 'timm' or Finder.busy:
                    return None
                Finder.busy = True
                try:
                    found = (finder.find_spec(name, path, target) for finder in sys.meta_path)
                    spec = next((spec for spec in found if spec is not None), None)
                finally:
                    Finder.busy = False
                if spec is None or spec.loader is None:
                    return spec
                loader = spec.loader
                def exec_module(module, run=loader.exec_module):
                    run(module)
                    try:
                        sys.meta_path.remove(Finder)
                        import timm_regnet_rnn
                    except Exception:
                        pass
                loader.exec_module = exec_module
                return spec
        sys.meta_path.insert(0, Finder)
    else:
        os.remove(file)
except Exception:
    pass
"""


def _site_dirs() -> List[Path]:
    """Folders whose .pth files this interpreter runs."""
    dirs = [sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        dirs.append(site.getusersitepackages())
    return list(dict.fromkeys(Path(d).resolve() for d in dirs))


def enabled_in() -> Optional[Path]:
    """The .pth file in force, or None."""
    return next((d / FILENAME for d in _site_dirs() if (d / FILENAME).is_file()), None)


def enable() -> Path:
    """Write the .pth file beside the installed package.

    Returns:
        The file.

    Raises:
        RuntimeError: The package is not installed in this interpreter's site-packages.
        OSError: The folder cannot be written.
    """
    here: Optional[Path]
    try:
        here = Path(str(distribution('timm-regnet-rnn').locate_file(''))).resolve()
    except PackageNotFoundError:
        here = None
    if here not in _site_dirs():
        raise RuntimeError("the package is not installed in this interpreter's site-packages; pip install it first.")
    path = here / FILENAME
    line = f'import sys; exec({HOOK!r}, {{"file": {str(path)!r}}})\n'
    scratch = path.with_suffix('.tmp')
    try:
        scratch.write_text(line, encoding='utf-8')
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)  # left behind only if writing failed
    return path


def disable() -> Optional[Path]:
    """Remove the .pth file.

    Returns:
        The file that was removed, or None if there was none.

    Raises:
        OSError: The file cannot be removed.
    """
    path = enabled_in()
    if path is not None:
        path.unlink()
    return path
