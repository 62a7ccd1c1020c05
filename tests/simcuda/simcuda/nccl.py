"""A process group called "nccl": it takes what NCCL takes, CUDA tensors only, and runs gloo on the same memory."""

import torch
import torch.distributed as dist

from simcuda import device, torch_cuda, waits

BACKEND = "simnccl"


def on_cpu(value):
    """CPU views of CUDA tensors, in lists too; RuntimeError for what NCCL refuses."""
    if isinstance(value, (list, tuple)):
        return [on_cpu(item) for item in value]
    if not value.is_cuda:
        raise RuntimeError("No backend type associated with device type cpu")
    if value.dtype in (torch.int16, torch.uint16):
        raise RuntimeError("Unconvertible NCCL type Short")
    return device.on_cpu(value)


class SimulatedNccl(dist.ProcessGroup):
    """One rank needs no gloo underneath."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout) if size > 1 else None

    def getBackendName(self):  # noqa: N802  torch's name
        return "nccl"

    def size(self):
        return self._size

    def rank(self):
        return self._rank

    def allreduce(self, tensors, opts=None):
        opts = opts or dist.AllreduceOptions()
        tensors = on_cpu(tensors)
        if opts.reduceOp == dist.ReduceOp.AVG:  # gloo has none
            for tensor in tensors:
                tensor.div_(self._size)
            opts.reduceOp = dist.ReduceOp.SUM
        return self._done(self._gloo and self._gloo.allreduce(tensors, opts))

    def allreduce_coalesced(self, tensors, opts=None):
        for tensor in tensors:
            self.allreduce([tensor], opts)
        return self._done()

    def broadcast(self, tensors, opts=None):
        tensors = on_cpu(tensors)
        return self._done(self._gloo and self._gloo.broadcast(tensors, opts))

    def reduce(self, tensors, opts=None):
        tensors = on_cpu(tensors)
        return self._done(self._gloo and self._gloo.reduce(tensors, opts))

    def allgather(self, outputs, tensors, opts=None):
        outputs, tensors = on_cpu(outputs), on_cpu(tensors)
        if self._gloo:
            return self._done(self._gloo.allgather(outputs, tensors, opts or dist.AllgatherOptions()))
        outputs[0][0].copy_(tensors[0])
        return self._done()

    def _allgather_base(self, output, tensor, opts=None):
        output, tensor = on_cpu(output).view(-1), on_cpu(tensor).reshape(-1)
        if self._gloo:
            parts = [torch.empty_like(tensor) for _ in range(self._size)]
            self._gloo.allgather([parts], [tensor]).wait()
            tensor = torch.cat(parts)
        output.copy_(tensor)
        return self._done()

    all_gather_single = _allgather_base

    def allgather_into_tensor_coalesced(self, outputs, tensors, opts=None):
        for output, tensor in zip(outputs, tensors, strict=True):
            self._allgather_base(output, tensor)
        return self._done()

    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def reduce_scatter(self, outputs, parts, opts=None):
        outputs, parts = on_cpu(outputs), on_cpu(parts)
        return self._scatter(outputs[0], torch.cat([part.reshape(-1) for part in parts[0]]), opts)

    def _reduce_scatter_base(self, output, tensor, opts=None):
        return self._scatter(on_cpu(output), on_cpu(tensor).reshape(-1).clone(), opts)

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter_tensor_coalesced(self, outputs, tensors, opts=None):
        for output, tensor in zip(outputs, tensors, strict=True):
            self._reduce_scatter_base(output, tensor, opts)
        return self._done()

    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def _scatter(self, output, whole, opts):
        all_reduce = dist.AllreduceOptions()
        if opts is not None and opts.reduceOp == dist.ReduceOp.AVG:
            whole.div_(self._size)
        elif opts is not None:
            all_reduce.reduceOp = opts.reduceOp
        if self._gloo:
            self._gloo.allreduce([whole], all_reduce).wait()
        output.copy_(whole.view(self._size, -1)[self._rank].view_as(output))
        return self._done()

    def barrier(self, opts=None):
        if self._gloo:
            self._gloo.allreduce([torch.ones(1)], dist.AllreduceOptions()).wait()
        waits.record("barrier")
        return self._done()

    def shutdown(self):
        pass

    def abort(self):
        pass

    def _done(self, work=None):
        if work is not None:
            work.wait()
        future = torch.futures.Future()
        future.set_result([])
        return torch._C._distributed_c10d._create_work_from_future(future)


def install() -> None:
    """torch.distributed takes "nccl" for it, where the simulated machine has a GPU."""
    dist.Backend.register_backend(BACKEND, SimulatedNccl, devices=["cuda"])
    init_process_group, new_group, get_backend = dist.init_process_group, dist.new_group, dist.get_backend

    def named(backend):
        return BACKEND if backend == "nccl" else backend

    def init(backend=None, *args, **opts):
        if torch_cuda.DEVICES == 0 and backend == "nccl":
            raise ValueError("ProcessGroupNCCL is only supported with GPUs, no GPUs found!")
        return init_process_group(named(backend), *args, **opts)

    def new(*args, **opts):
        if "backend" in opts:
            opts["backend"] = named(opts["backend"])
        return new_group(*args, **opts)

    def get(group=None):
        backend = get_backend(group)
        return "nccl" if backend == BACKEND else backend

    for module in (dist, dist.distributed_c10d):
        module.init_process_group, module.new_group, module.get_backend = init, new, get
        module.is_nccl_available = lambda: True
