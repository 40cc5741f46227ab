"""Map the three source folders to one import namespace, and build the CPU's kernels.

pyproject.toml holds the rest.
"""

import os
import platform
import runpy
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOTS = {"quire": "core_engine", "quire.kernels": "kernels", "quire.integrations": "integrations"}

packages = [
    name
    for root, folder in ROOTS.items()
    for name in (root, *(f"{root}.{package}" for package in find_packages(folder)))
]

NATIVE = Path("kernels/cpu/native")
FLAGS = [
    "-std=c++20",
    "-O2",  # -O3 moves loads about until sums no longer fit the registers
    "-g0",
    "-fvisibility=hidden",
    # One rounding for a * b + c, in every file and loop alike, whatever CPU it is tuned for.
    "-ffp-contract=fast",
    "--param=avoid-fma-max-bits=0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # of GCC 12 in its own headers, hundreds of times
    "-Wno-uninitialized",
    "-pthread",
]
# One file per instruction set; which is used is decided when it runs.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
AMX = ["-mamx-tile", "-mamx-bf16", "-mamx-int8"]
ISA_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma"],
    "isa_avx512.cpp": AVX512,
    "isa_avx512bf16.cpp": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "isa_amx.cpp": [*AVX512, "-mavx512bf16", "-mavx512vnni", *AMX],
    "isa_avx512bf16_emulated.cpp": ["-mavx2", "-mfma"],
    "isa_amx_emulated.cpp": ["-mavx2", "-mfma"],
}
# What an older compiler may not know; without them these files are empty.
OPTIONAL_FLAGS = ("isa_avx512bf16.cpp", "isa_amx.cpp")
TILE_DOTS = ("tdpbf16ps", "tdpbssd", "tdpbusd")
LINK_FLAGS = ["-pthread"]
SANITIZER_FLAGS = []
if os.environ.get("QUIRE_SANITIZE") == "1":  # see the Makefile's target of that name
    SANITIZER_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    FLAGS += [*SANITIZER_FLAGS, "-O1", "-g1", "-fno-omit-frame-pointer"]
    LINK_FLAGS += SANITIZER_FLAGS
if "1" in (os.environ.get("QUIRE_SANITIZE"), os.environ.get("QUIRE_EMULATE_ISAS")):
    FLAGS += ["-DQUIRE_EMULATE_ISAS"]  # tests then try on any CPU what it has no instructions for
if platform.system() == "Linux":
    # What is weak in a library, such as instances of std's templates, would be anybody's else.
    LINK_FLAGS += [f"-Wl,--version-script={NATIVE / 'exports.map'}"]


def flags_of(machine):
    """Return the flags that single files are compiled with besides, for a CPU of that name."""
    flags = dict(ISA_FLAGS) if machine.lower() in ("x86_64", "amd64") else {}  # else all empty
    if SANITIZER_FLAGS:
        flags["isa_generic.cpp"] = ["-DQUIRE_WIDE"]
    hash_of = runpy.run_path("kernels/cpu/sources.py")["hash_of"]
    flags["library.cpp"] = [f'-DQUIRE_SOURCES="{hash_of(NATIVE)}"']
    return flags


def num_usable_cores():
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class BuildNative(build_ext):
    """Compiles each file for the instruction set that it is named for, one on each core."""

    def build_extensions(self):
        """Compile, with the flags of `flags_of` for the files it names."""
        compile_one, compile_all = self.compiler._compile, self.compiler.compile
        flags = {
            name: own
            for name, own in flags_of(platform.machine()).items()
            if name not in OPTIONAL_FLAGS or self.knows(own)
        }

        def compile_together(*args, **kwargs):
            begun = []

            def begin(obj, src, ext, cc_args, extra_postargs, pp_opts):
                own = [*extra_postargs, *flags.get(Path(src).name, [])]
                begun.append(pool.submit(compile_one, obj, src, ext, cc_args, own, pp_opts))

            self.compiler._compile = begin
            with ThreadPoolExecutor(num_usable_cores()) as pool:
                objects = compile_all(*args, **kwargs)
            for compiled in begun:
                compiled.result()
            return objects

        self.compiler.compile = compile_together
        super().build_extensions()

    def knows(self, flags):
        """Whether the compiler takes these flags, and the assembler what comes of them."""
        program = "int main() { "
        if "-mamx-tile" in flags:
            for instruction in ("tilerelease", *(f"{dot} %tmm2,%tmm1,%tmm0" for dot in TILE_DOTS)):
                program += f'asm volatile("{instruction}"); '
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "knows.cpp")
            source.write_text(program + "}\n")
            try:
                self.compiler.compile([str(source)], folder, extra_preargs=flags)
            except CompileError:
                return False
        return True

    def get_output_mapping(self):
        """Return what was built: without a compiler, nothing."""
        mapping = super().get_output_mapping()
        return {built: place for built, place in mapping.items() if Path(built).exists()}


if __name__ == "__main__":
    setup(
        package_dir=ROOTS,
        packages=packages,
        ext_modules=[
            Extension(
                "quire.kernels.cpu._native",
                sources=[str(path) for path in sorted(NATIVE.glob("*.cpp"))],
                depends=[str(path) for path in NATIVE.iterdir()],
                language="c++",
                extra_compile_args=FLAGS,
                extra_link_args=LINK_FLAGS,
                # Without a compiler the package installs all the same, and runs on plain torch.
                optional=os.environ.get("QUIRE_REQUIRE_NATIVE") != "1",
            )
        ],
        cmdclass={"build_ext": BuildNative},
    )
