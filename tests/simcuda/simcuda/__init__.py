"""A simulated CUDA device for the CPU build of torch: programs of the project run on it unchanged.

    PYTHONPATH=tests/simcuda python -m simcuda -m mf_dist.train configs/digits_cpu.yaml engine.precision=bf16

device.cpp runs every operator of a "cuda" tensor by the CPU kernel on the same memory; torch_cuda.py answers for
torch.cuda as an H100 would; nccl.py is an "nccl" that takes CUDA tensors only; waits.py counts what the host waits for;
compiled.py, if asked for, has torch.compile generate Triton for sm_90 and compile it to cubins, which are not run.

It shows: tensors on the wrong device, collectives on CPU tensors, device ordinals that do not exist, what DeepSpeed's
real CUDA accelerator does, kernels and bytes of eager code, waits of the host for the device, memory held, graphs and
graph breaks, whether generated and handwritten Triton compiles, bytes and launches of the compiled step.

It cannot show: anything of time; races between streams and lifetimes of pinned memory; NCCL itself; numerics of CUDA
kernels (its fp32 is the CPU's) and what cuDNN, cuBLAS or the driver refuse; results of compiled code, whose kernels do
nothing; fork after a real context; fragmentation. Attention is the math form in eager runs.

Environment: SIMCUDA_DEVICES=N, GPUs that the process sees (1). SIMCUDA_WAITS=FILE, written at exit: every wait of the
host, with the lines of code that caused it. SIMCUDA_COMPILED=1: torch.compile for sm_90; fresh memory reads as zeros.
"""

from simcuda_build import load

device = load()

from simcuda import nccl, torch_cuda, waits  # noqa: E402

torch_cuda.install()
waits.install()
nccl.install()
