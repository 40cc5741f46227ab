"""Build the C++ check of the native kernels, with the flags that setup.py builds them with.

`python build.py [--compiler aarch64-linux-gnu-g++] [--static] OUTPUT`
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECK = Path(__file__).resolve().parent
ROOT = CHECK.parents[2]
NATIVE = ROOT / "kernels" / "cpu" / "native"


def build(output: Path, compiler: str = "c++", *, is_static: bool = False) -> None:
    """Compile the kernels and the check, for the machine that `compiler` compiles for."""
    before = Path.cwd()
    os.chdir(ROOT)  # setup.py names its files from there
    try:
        setup = runpy.run_path("setup.py", run_name="setup")
    finally:
        os.chdir(before)
    machine = subprocess.run(
        [compiler, "-dumpmachine"], check=True, capture_output=True, text=True
    ).stdout.partition("-")[0]
    flags, flags_of = setup["FLAGS"], setup["flags_of"](machine)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: Path) -> str:
            built = f"{folder}/{source.stem}.o"
            own = ["-DQUIRE_EMULATE_ISAS"]
            if source.parent == CHECK:
                own += ["-Wall", "-Wextra", f"-I{NATIVE}"]
            special = flags_of.get(source.name, [])
            subprocess.run(
                [compiler, *flags, *own, *special, "-c", str(source), "-o", built], check=True
            )
            return built

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sources = [*sorted(NATIVE.glob("*.cpp")), *sorted(CHECK.glob("*.cpp"))]
            objects = list(pool.map(compile_one, sources))
        static = ["-static"] if is_static else []
        links = setup["SANITIZER_FLAGS"] + ["-pthread"]
        subprocess.run([compiler, *objects, *static, *links, "-o", str(output)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--compiler", default="c++")
    parser.add_argument("--static", action="store_true")
    arguments = parser.parse_args()
    build(arguments.output, arguments.compiler, is_static=arguments.static)
