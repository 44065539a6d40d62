"""device=xla: TPUs, and whatever else torch_xla compiles for.

One process a host sees all chips as one device (SPMD). The batch is global, `world` is 1, and what
is a collective elsewhere is the identity. torch_xla records operations and compiles them as graphs,
one for each shape.

The hosts of a TPU slice run the same program on the same global batch. Each uploads what belongs to
its chips. They must run the same graphs and fetch the same tensors in the same order. Only host 0
writes and prints.
"""

import numpy as np
import torch
import torch.distributed as dist

from nano import tensor
from nano.config import UserError
from nano.runtime import Runtime, at_once


class XLA(Runtime):
    """The Runtime of device=xla.

    mesh: all chips, with the axes "data" and "tensor"; None with parallel=none, on one chip.
    specs: {id of a parameter: the mesh axis of each of its dimensions}.
    """

    fixed_shapes = True

    def _start(self, device):
        if self.offload or self.reduce_dtype != torch.float32:
            raise UserError(
                "device=xla has no offload= and no reduce_dtype=: "
                "its gradients are summed in float32"
            )
        try:
            import torch_xla
            import torch_xla.core.xla_model as xm
            import torch_xla.distributed.spmd as xs
            import torch_xla.runtime as xr
        except ImportError as e:
            raise UserError(f"device=xla needs torch_xla (see requirements-xla.txt): {e}") from None
        self.xla = torch_xla
        self.xm = xm
        self.xs = xs
        self.mesh = None
        self.specs = {}
        spmd = self.parallel != "none"
        if self.parallel not in ("ddp", "fsdp", "none") or self.tensor > 1 and not spmd:
            raise UserError(
                f"parallel={self.parallel}: on device=xla use ddp, fsdp or none, "
                "with tensor= ddp or fsdp"
            )
        if spmd:
            xr.use_spmd()  # before the first XLA tensor
        self.device = torch_xla.device()
        # This starts the client. A CPU backward before that would break every later one on XLA.
        torch.zeros(1, device=self.device).cpu()
        self.process = xr.process_index()
        self.processes = xr.process_count()
        if self.processes > 1:  # the hosts of a slice
            if not spmd:
                raise UserError(
                    f"parallel=none uses one chip, but this slice has {self.processes} hosts: "
                    "use ddp or fsdp"
                )
            # registers the init method xla://, which finds the addresses of the hosts
            import torch_xla.distributed.xla_backend  # noqa: F401

            with at_once():
                dist.init_process_group("gloo", init_method="xla://")
        if spmd:
            count = xr.global_runtime_device_count()
            if count % self.tensor:
                raise UserError(f"tensor={self.tensor} must divide the number of devices, {count}")
            self.shards = count // self.tensor
            self.mesh = xs.Mesh(np.arange(count), (self.shards, self.tensor), ("data", "tensor"))
            xs.set_global_mesh(self.mesh)

    # ---------------------------------------------------------------------------------------- model

    def distribute(self, model, compile=False, grad_checkpoint=False):
        if compile:
            raise UserError(
                "compile=true is for cpu and cuda: device=xla compiles whole steps in any case"
            )
        if model.cfg.n_experts:
            raise UserError(
                "a mixture of experts does not run on device=xla: an expert gets another number of "
                "tokens in each step, and a program there has fixed shapes"
            )
        super().distribute(model, compile, grad_checkpoint)
        if self.mesh is not None:
            if self.parallel == "fsdp" or self.tensor > 1:
                self._mark_parameters(model)
            for layer in model.layers:  # keeps the activations sharded along the batch
                layer.register_forward_hook(lambda layer, inputs, x: self._mark_batch(x))
        self.sync()

    def _mark_parameters(self, model):
        dims = tensor.shard_dims(model, self.tensor) if self.tensor > 1 else {}
        styles = tensor.shared_layers(model)
        shards = self.shards if self.parallel == "fsdp" else 1
        for name, p in model.named_parameters():
            # Embedding and head are not sharded by token. Sampled tokens would come back sharded,
            # and every fetch would compile a new graph.
            vocabulary = styles.get(name.rpartition(".")[0]) == "VOCABULARY"
            dim = None if vocabulary else dims.get(name)
            self.specs[id(p)] = partition_spec(p.shape, dim, shards)
            self.xs.mark_sharding(p, self.mesh, self.specs[id(p)])

    def _mark_batch(self, t):
        """Shards t (B, ...) along B where the shards are equal: XLA fails on some unequal ones."""
        if self.mesh is not None and t.shape[0] % self.shards == 0:
            self.xs.mark_sharding(t, self.mesh, ("data",) + (None,) * (t.dim() - 1))
        return t

    def recompute(self, layer, x, *inputs):
        from torch_xla.utils.checkpoint import checkpoint

        # The reentrant kind gives a gradient to adapters only if some input needs one, which the
        # output of frozen embeddings does not.
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        # a bound method, because the weights must be behind checkpoint's barrier too
        return checkpoint(layer.forward, x, *inputs, use_reentrant=True)

    # ----------------------------------------------------------------------------------------- step

    def put(self, batch):
        batch = super().put(batch)
        return {name: self._mark_batch(t) if t.dim() > 1 else t for name, t in batch.items()}

    def step(self, optimizer, params, lr, grad_clip):
        if not optimizer.state:
            self.init_moments(optimizer)
        return super().step(optimizer, params, lr, grad_clip)

    def init_moments(self, optimizer):
        """Creates Adam's moments where there are none, so that the first step runs the same graph
        as all others. Shards parameters and moments alike, also after a state was loaded."""
        optimizer.skips = torch.zeros(3, device=self.device)
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0, device=self.device)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                if id(p) in self.specs:
                    for t in (p, state["exp_avg"], state["exp_avg_sq"]):
                        self.xs.mark_sharding(t, self.mesh, self.specs[id(p)])
        self.sync()

    def sync(self):
        """Runs the operations recorded so far."""
        state = self.xm.get_rng_state()
        self.xla.sync()
        # Each sync advances XLA's generator. An evaluation must not, because a resumed run begins
        # by repeating it.
        if not torch.is_grad_enabled():
            self.xm.set_rng_state(state)

    def wait(self):
        self.xla.sync(wait=True)

    def once(self, f, *args):
        """f(*args), called by host 0 alone, which broadcasts the result or the UserError.

        Use it for whatever could differ between hosts, such as whether a file exists or what a
        user's reward function returned. Hosts that branch differently deadlock.
        """
        if self.processes == 1:
            return f(*args)
        box = [None, None]
        if self.is_main:
            try:
                box[0] = f(*args)
            except UserError as e:
                box[1] = e
        dist.broadcast_object_list(box)
        if box[1]:
            raise box[1]
        return box[0]

    def compiles(self):
        """{"graphs": how many were compiled so far}. It must stop growing after the first steps."""
        from torch_xla.debug.metrics import metric_data

        return {"graphs": (metric_data("CompileTime") or (0,))[0]}

    # ---------------------------------------------------------------------------------------- state

    def seed(self, seed):
        super().seed(seed)
        self.xla.manual_seed(seed)

    def _generators(self):
        # 64 bits without a sign, in two parts, because no torch dtype holds them for sure
        def get():
            return torch.tensor(divmod(self.xm.get_rng_state(), 2**32))

        def set_state(state):
            high, low = state.tolist()
            self.xm.set_rng_state(high * 2**32 + low)

        return super()._generators() | {"xla": (get, set_state)}

    def to_cpu(self, t):
        t = t.detach()
        if self.mesh is not None and t.device.type == "xla" and t.is_floating_point() and t.dim():
            # gathered in a graph of its own, because XLA would compile the gathering anew each time
            t = t * 1
            self.xs.mark_sharding(t, self.mesh, (None,) * t.dim())
        return t.cpu()

    def _unsharded(self, t):
        return self.to_cpu(t)  # on all hosts, which must fetch the same tensors


def partition_spec(shape, tensor_dim, shards):
    """The mesh axis of each dimension of a parameter, None for a dimension that is not sharded.

    "tensor" is the axis of `tensor_dim`. If shards > 1, "data" is the axis of a matrix's largest
    other dimension that `shards` divides.
    """
    spec = [None] * len(shape)
    if tensor_dim is not None:
        spec[tensor_dim] = "tensor"
    free = [d for d in range(len(shape)) if spec[d] is None and shape[d] % shards == 0]
    if free and shards > 1 and len(shape) > 1:
        spec[max(free, key=lambda d: shape[d])] = "data"
    return tuple(spec)
