"""Compiles every kernel of csrc/gpu for GPUs that need not be here; launch/compile-gpu calls it.

compile_gpu.py OUT [TARGET…]     without targets: all those whose tools are here

sm_80 sm_90 sm_100   nvcc and ptxas    -> OUT/TARGET/NAME.ptx, NAME.cubin, NAME.txt (registers, spills)
                     with sm_90 also csrc/gpu/hopper, for sm_90a -> OUT/sm_90/hopper/NAME.…
gfx942 gfx950        clang 22, lld 22  -> OUT/TARGET/NAME.s, NAME.co, NAME.ll (before any optimisation)
                     and the HIP headers and device bitcode of the triton wheel; the host half is checked as well

csrc/gpu/sampling goes to OUT/TARGET/sampling.

A target that is up to date is left alone. Exit code 3, with the reason, when the tools for a target asked for (or for
all) are missing.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942", "gfx950")
NO_TOOLS = 3
HOPPER = ROOT / "csrc/gpu/hopper"
SAMPLING = ROOT / "csrc/gpu/sampling"

CLANG = "clang++-22"
LLD = "ld.lld-22"
INCLUDES = [f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# As in CMakeLists.txt: a*b+c is never contracted into one rounding.
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fmad=false", "-Xcompiler=-Wall,-Wextra", "-Werror=all-warnings"]
HIP_FLAGS = ["-x", "hip", "-std=c++17", "-O3", "-DNDEBUG", "-ffp-contract=off"]

# The wheel has ocml and ockl, but not the small modules that set their switches. Each defines constants.
SWITCHES = {
    "opencl": {},  # clang insists on it
    "oclc_abi_version_600": {"ABI_version": ("i32", 600)},
    "oclc_correctly_rounded_sqrt_off": {"correctly_rounded_sqrt32": ("i8", 0)},
    "oclc_correctly_rounded_sqrt_on": {"correctly_rounded_sqrt32": ("i8", 1)},
    "oclc_finite_only_off": {"finite_only_opt": ("i8", 0)},
    "oclc_finite_only_on": {"finite_only_opt": ("i8", 1)},
    "oclc_isa_version_942": {"ISA_version": ("i32", 9402)},
    "oclc_isa_version_950": {"ISA_version": ("i32", 9500)},
    "oclc_unsafe_math_off": {"unsafe_math_opt": ("i8", 0)},
    "oclc_unsafe_math_on": {"unsafe_math_opt": ("i8", 1)},
    "oclc_wavefrontsize64_off": {"wavefrontsize64": ("i8", 0), "wavefrontsize_log2": ("i8", 5)},
    "oclc_wavefrontsize64_on": {"wavefrontsize64": ("i8", 1), "wavefrontsize_log2": ("i8", 6)},
}


def amd_files() -> Path | None:
    """Where the triton wheel keeps HIP's headers and device bitcode."""
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        files = Path(folder) / "backends/amd"
        if (files / "include/hip/hip_runtime.h").is_file() and (files / "lib/ockl.bc").is_file():
            return files
    return None


def missing_tools(target: str) -> str:
    """What is not here of what a target needs; empty if all is."""
    if target in NVIDIA:
        return ", ".join(f"no {tool}" for tool in ("nvcc", "ptxas") if not shutil.which(tool))
    missing = [f"no {tool}" for tool in (CLANG, LLD) if not shutil.which(tool)]
    if amd_files() is None:
        missing.append(f"no triton with HIP's headers in {sys.prefix}")
    return ", ".join(missing)


def run(*command: object, stdin: str | None = None) -> str:
    """What a command writes to stderr; raises with it if the command fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stderr


def make_rocm_tree(tree: Path) -> None:
    """Lays the wheel's files out as clang expects an installation of ROCm."""
    files = amd_files()
    assert files is not None
    bitcode = tree / "amdgcn/bitcode"
    bitcode.mkdir(parents=True)
    (tree / "include").symlink_to(files / "include")
    for name in ("ocml.bc", "ockl.bc"):
        (bitcode / name).symlink_to(files / "lib" / name)
    for name, constants in SWITCHES.items():
        text = "".join(
            f"@__oclc_{constant} = linkonce_odr hidden local_unnamed_addr addrspace(4) constant {kind} {value}\n"
            for constant, (kind, value) in constants.items()
        )
        options = ("--target=amdgcn-amd-amdhsa", "-nogpulib", "-Wno-override-module", "-x", "ir", "-c", "-emit-llvm")
        run(CLANG, *options, "-", "-o", bitcode / f"{name}.bc", stdin=text)
    (tree / "share/hip").mkdir(parents=True)
    defines = (files / "include/hip/hip_version.h").read_text().split("\n")
    version = dict(line.split()[1:3] for line in defines if line.startswith("#define HIP_VERSION_M"))
    (tree / "share/hip/version").write_text("".join(f"{k}={v}\n" for k, v in version.items()) + "HIP_VERSION_PATCH=0\n")


def compile_nvidia(source: Path, target: str, out: Path) -> None:
    """PTX, then machine code; ptxas tells what each kernel uses."""
    if source.parent == HOPPER:
        target = f"{target}a"
    ptx = out / f"{source.stem}.ptx"
    run("nvcc", *NVCC_FLAGS, *INCLUDES, f"-arch={target}", "-ptx", source, "-o", ptx)
    used = run("ptxas", "-v", f"-arch={target}", ptx, "-o", ptx.with_suffix(".cubin"))
    ptx.with_suffix(".txt").write_text(used)


def compile_amd(source: Path, target: str, out: Path, tree: Path) -> None:
    """Assembly, and from it the code object; the code as the front end hands it over."""
    assembly = out / f"{source.stem}.s"
    device = (f"--rocm-path={tree}", "--offload-device-only", f"--offload-arch={target}", "-S")
    run(CLANG, *HIP_FLAGS, *WARNINGS, *INCLUDES, *device, source, "-o", assembly)
    unoptimised = ("-emit-llvm", "-Xclang", "-disable-llvm-passes")
    run(CLANG, *HIP_FLAGS, *INCLUDES, *device, *unoptimised, source, "-o", assembly.with_suffix(".ll"))
    run(CLANG, "--target=amdgcn-amd-amdhsa", f"-mcpu={target}", assembly, "-o", assembly.with_suffix(".co"))


def check_amd_host(source: Path, tree: Path) -> None:
    """The half that runs on the host compiles too; nothing here could link it."""
    host = (f"--rocm-path={tree}", "--offload-host-only", "-fsyntax-only")
    run(CLANG, *HIP_FLAGS, *WARNINGS, *INCLUDES, *host, source)


def fingerprint(target: str) -> str:
    """Hash of everything that the outputs come from."""
    digest = hashlib.sha256()
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".h")]
    for path in sorted([*sources, Path(__file__)]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    tool = "nvcc" if target in NVIDIA else CLANG
    digest.update(subprocess.run([tool, "--version"], capture_output=True, check=True).stdout)
    digest.update(str(amd_files()).encode())
    return digest.hexdigest()


def compile_target(target: str, out: Path) -> int:
    """Compiles what is not up to date; returns the number of sources that failed."""
    folder = out / target
    stamp, wanted = folder / "stamp", fingerprint(target)
    if stamp.is_file() and stamp.read_text() == wanted:
        print(f"{target}: up to date", file=sys.stderr)
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tree = folder / "rocm"
    if target in AMD:
        make_rocm_tree(tree)
    failures = 0
    sources = [*sorted((ROOT / "csrc/gpu").glob("*.cu")), *sorted(SAMPLING.glob("*.cu"))]
    if target == "sm_90":
        sources += sorted(HOPPER.glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {}
        for source in sources:
            to = folder if source.parent.name == "gpu" else folder / source.parent.name
            to.mkdir(exist_ok=True)
            if target in NVIDIA:
                jobs[pool.submit(compile_nvidia, source, target, to)] = source.name
            else:
                jobs[pool.submit(compile_amd, source, target, to, tree)] = source.name
                jobs[pool.submit(check_amd_host, source, tree)] = f"{source.name}, host half"
        for job, what in jobs.items():
            error = job.exception()
            failures += error is not None
            print(f"{target}: {what}: {'failed' if error else 'ok'}", file=sys.stderr)
            if error:
                print(error, file=sys.stderr)
    if not failures:
        stamp.write_text(wanted)
    return failures


def main(arguments: list[str]) -> int:
    """See the head of the file."""
    if not arguments or not set(arguments[1:]) <= {*NVIDIA, *AMD}:
        print(__doc__, file=sys.stderr)
        return 2
    out, wanted = Path(arguments[0]).resolve(), arguments[1:]
    targets = wanted or [*NVIDIA, *AMD]
    missing = {target: reason for target in targets if (reason := missing_tools(target))}
    for target, reason in missing.items():
        print(f"{target}: not compiled: {reason}", file=sys.stderr)
    targets = [target for target in targets if target not in missing]
    if not targets or (wanted and missing):
        return NO_TOOLS
    out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for target in targets:
        with (out / f"{target}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # tests side by side want the same outputs
            failures += compile_target(target, out)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
