"""Build the Cython extensions; everything else stands in pyproject.toml.

Environment variables choose another build:

METASTORE_DEBUG=1
    The checks of Cython (bounds, None, unset views) and of C (assert); ``-O1 -g``.
METASTORE_SANITIZE=1
    AddressSanitizer and UndefinedBehaviorSanitizer (gcc or clang on Linux).
METASTORE_COVERAGE=1
    Line tracing, so that coverage.py sees the lines of ``_codec.pyx``.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup


def chosen(name: str) -> bool:
    """Tell whether the environment asks for the build `name`."""
    return os.environ.get(f"METASTORE_{name}", "0") not in ("", "0")


debug, sanitize, coverage = chosen("DEBUG"), chosen("SANITIZE"), chosen("COVERAGE")

directives = {
    "language_level": 3,
    "boundscheck": debug,
    "wraparound": False,
    "initializedcheck": debug,
    "nonecheck": debug,
    "overflowcheck": False,  # checksums and shuffles wrap around on purpose
    "cdivision": True,
    "freethreading_compatible": True,
    "linetrace": coverage,
    "auto_pickle": False,
}
compile_args = ["-O3"]
link_args = []
macros = []
if debug:
    compile_args = ["-O1", "-g", "-UNDEBUG"]
if sanitize:
    sanitizers = "-fsanitize=address,undefined"
    compile_args = ["-O1", "-g", "-fno-omit-frame-pointer", sanitizers]
    compile_args += ["-fno-sanitize-recover=all"]  # a finding ends the process
    link_args = [sanitizers]
if coverage:
    compile_args = ["-O1", "-g"]
    macros = [("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")]

# One folder per build, so that no build takes the C of another for its own.
flavours = [
    word
    for word, wanted in (
        ("debug", debug),
        ("sanitize", sanitize),
        ("coverage", coverage),
    )
    if wanted
]

extensions = [
    Extension(
        f"metastore.{name}",
        [f"metastore/{name}.pyx"],
        depends=["metastore/_kernels.h", "metastore/_turnstile.h"],
        include_dirs=["metastore"],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    for name in ("_codec", "_commit", "_merge")
]

setup(
    ext_modules=cythonize(
        extensions,
        build_dir=os.path.join("build", "-".join(["cython", *flavours])),
        compiler_directives=directives,
    ),
    # The compiler's flags are no file: times alone would keep an extension that an
    # earlier run built with others.
    options={"build_ext": {"force": True, "parallel": len(extensions)}},
)
