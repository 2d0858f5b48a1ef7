"""Puts the compiled CPU kernels into a wheel, and its platform into the wheel's name, where there is a C++ compiler.

Without one, or with CXX=none, the wheel is for every platform and the kernels are compiled on first use. An editable
install and the sdist carry the source alone.
"""

import hashlib
import importlib.util
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

OPS = 'timm_regnet_rnn/ops'


def load_compiling(root: str) -> Any:
    """The package's module that compiles, without the package, which needs torch."""
    spec = importlib.util.spec_from_file_location('compile_cpu', Path(root) / OPS / 'compile_cpu.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CompiledKernels(BuildHookInterface):
    """The hook of hatchling's wheel target."""

    def initialize(self, version: str, build_data: Dict[str, Any]) -> None:
        """Compile every level, and add the libraries and their sums to the wheel."""
        compiling = load_compiling(self.root)
        if version == 'editable' or not compiling.WHEEL_LEVELS:
            return
        try:
            compiler = compiling.find_compiler()
            with ThreadPoolExecutor() as pool:
                made = pool.map(lambda level: compiling.compile_library(level, compiler), compiling.WHEEL_LEVELS)
                libraries = dict(zip(compiling.WHEEL_LEVELS, made))
        except OSError as e:
            self.app.display_warning(f'{e}: the wheel has no compiled CPU kernels; they are compiled on first use.')
            return
        self.folder = tempfile.TemporaryDirectory()
        for level, data in libraries.items():
            library = Path(self.folder.name) / compiling.library_name(level)
            library.write_bytes(data)
            compiling.sum_file(library).write_text(hashlib.sha256(data).hexdigest(), encoding='utf-8')
            for file in (library, compiling.sum_file(library)):
                build_data['force_include'][str(file)] = f'{OPS}/{file.name}'
        platform = sysconfig.get_platform().replace('-', '_').replace('.', '_')
        build_data.update(pure_python=False, tag=f'py3-none-{platform}')

    def finalize(self, version: str, build_data: Dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled, which the wheel has now."""
        if hasattr(self, 'folder'):
            self.folder.cleanup()
