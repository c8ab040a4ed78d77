"""One run on several devices and machines, on the frameworks' own engines: the same updates as on one device.

Every device computes a slice of the global batch, and what an update needs of the whole batch (the sums of batch norm
and of the soft Dice, the gradients) is summed over all of them. TensorFlow: `tf.distribute.MirroredStrategy`, or
`MultiWorkerMirroredStrategy` where TF_CONFIG names several workers. JAX: `keras.distribution.DataParallel`, with
`jax.distributed` where KERAS_DISTRIBUTION_NUM_PROCESSES names several processes; its arrays are those of the whole
batch, whatever they are cut into, so the network needs nothing more.

>>> int(total(3)), start(None).replicas
(3, 1)
"""

import contextlib
import json
import os

import keras
import numpy as np

# -- for the layers and losses ----------------------------------------------------------------------------------


def _context():
    """TensorFlow's context of one replica among several, or None."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    found = tf.distribute.get_replica_context()
    return found if found is not None and found.num_replicas_in_sync > 1 else None


def total(x):
    """Sum of a tensor over the replicas that compute slices of one batch; `x` where there is one."""
    context = _context()
    return x if context is None else context.all_reduce("SUM", x)


def replicas():
    """Number of replicas that compute slices of one batch."""
    context = _context()
    return 1 if context is None else context.num_replicas_in_sync


def replica():
    """Number of the replica that computes this slice of the batch, from 0."""
    context = _context()
    return 0 if context is None else context.replica_id_in_sync_group


def for_logs(value):
    """A scalar in the shape that Keras averages over replicas: with several TensorFlow workers a vector (3.15)."""
    context = _context()
    several = context is not None and context.strategy.extended._in_multi_worker_mode()
    return keras.ops.reshape(value, (1,)) if several else value


# -- for a run --------------------------------------------------------------------------------------------------


class Alone:
    """One device: nothing to share."""

    replicas = processes = 1  # that an update is cut over
    process = 0  # the number of this one
    slices = range(1)  # of the global batch that this process feeds
    chief = True  # whether this process is the one that writes
    words = ""  # on it, for the first line of a run
    lost = ()  # kinds of exception raised where another process is lost

    def scope(self):
        """Where the network and its optimizer are made."""
        return contextlib.nullcontext()

    def apart(self):
        """Where this process computes something by itself."""
        return contextlib.nullcontext()

    def feed(self, batches):
        """What `fit` takes; `batches(slices)` yields, update by update, those slices of the global batch in turn."""
        return batches(self.slices)

    def gather(self, value: int):
        """The values of all processes, the chief's first, in every process; waits for all of them."""
        return [value]

    def agree(self, value: int) -> int:
        """The chief's value, in every process."""
        return int(self.gather(value)[0])

    def any(self, value: bool) -> bool:
        """Whether a process says so."""
        return bool(max(self.gather(int(value))))

    def _share(self, engine, local):
        """Divide the slices among the processes, of which this one has `local` devices."""
        if local * self.processes != self.replicas:
            found = f"{local} here, {self.replicas} on all {self.processes}"
            raise ValueError(f"--distribute needs machines with as many devices each: {found}")
        self.slices = range(self.process * local, (self.process + 1) * local)
        self.chief = self.process == 0
        among = f" in {self.processes} processes, this one number {self.process}" if self.processes > 1 else ""
        self.words = f"; every batch shared by {self.replicas} devices{among} ({engine})"


class TensorFlow(Alone):
    """`tf.distribute`: variables mirrored on every device, one replica each."""

    def __init__(self, count):
        import tensorflow as tf

        self.tf = tf
        config = json.loads(os.environ.get("TF_CONFIG") or "{}")
        cluster, task = config.get("cluster", {}), config.get("task", {})
        chiefs, workers = (len(cluster.get(kind, ())) for kind in ("chief", "worker"))
        self.processes = max(1, chiefs + workers)
        self.process = int(task.get("index", 0)) + (chiefs if task.get("type") == "worker" else 0)
        kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
        if kind == "CPU" and count:
            (processor,) = tf.config.list_physical_devices("CPU")
            tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * count)
        if self.processes > 1:
            engine, self.strategy = "MultiWorkerMirroredStrategy", tf.distribute.MultiWorkerMirroredStrategy()
            self.lost = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError)
        else:
            devices = [device.name for device in tf.config.list_logical_devices(kind)]
            engine, self.strategy = "MirroredStrategy", tf.distribute.MirroredStrategy(devices[: count or None])
        self.replicas = self.strategy.num_replicas_in_sync
        self._share(f"tf.distribute.{engine}", len(self.strategy.extended.worker_devices))

    def scope(self):
        return self.strategy.scope()

    def feed(self, batches):
        tf, first = self.tf, next(batches(self.slices))
        signature = tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape, array.dtype), first)

        def mine(context):
            found = tf.data.Dataset.from_generator(lambda: batches(self.slices), output_signature=signature)
            return found.prefetch(2 * len(self.slices))

        return self.strategy.distribute_datasets_from_function(mine)

    def gather(self, value):
        if self.processes == 1:
            return [value]
        # The sum of vectors that hold one replica's value each.
        mine = self.strategy.experimental_distribute_values_from_function(
            lambda context: self.tf.one_hot(context.replica_id_in_sync_group, self.replicas, int(value), 0)
        )
        return self.strategy.reduce("SUM", mine, axis=None).numpy()


class Jax(Alone):
    """`keras.distribution.DataParallel`: variables on every device, arrays cut along the batch."""

    def __init__(self, count):
        import jax

        self.processes = int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES") or 1)
        if count:
            with contextlib.suppress(RuntimeError):  # of a backend that has started: it has what XLA_FLAGS say
                jax.config.update("jax_num_cpu_devices", count)
        if self.processes > 1:
            keras.distribution.initialize()
        self.process = jax.process_index()
        devices = jax.devices() if self.processes > 1 else jax.devices()[: count or None]
        names = [f"{device.platform}:{device.id}" for device in devices]
        self.distribution = keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)
        self.replicas = len(devices)
        local = len(jax.local_devices()) if self.processes > 1 else self.replicas
        self._share("keras.distribution.DataParallel", local)

    def scope(self):
        keras.distribution.set_distribution(self.distribution)  # for good: `fit` looks it up, too
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def apart(self):
        before = keras.distribution.distribution()
        keras.distribution.set_distribution(None)
        try:
            yield
        finally:
            keras.distribution.set_distribution(before)

    def feed(self, batches):
        mine = batches(self.slices)
        while True:
            parts = [next(mine) for _ in self.slices]
            yield keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts)

    def gather(self, value):
        if self.processes == 1:
            return [value]
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(int(value))


def start(devices: int | None) -> Alone:
    """What a run is spread over; must come before anything is computed.

    None: one device. 0: all devices, of all machines that the environment names. N: the first N of this machine; on a
    CPU, N virtual ones, for trying things out. ValueError if there are fewer, or the backend has no engine here.
    """
    if devices is None:
        return Alone()
    engines = {"tensorflow": TensorFlow, "jax": Jax}
    backend = keras.backend.backend()
    if backend not in engines:
        raise ValueError(f"--distribute needs the backend tensorflow or jax. Received: {backend}")
    found = engines[backend](devices)
    if devices and found.processes > 1:
        raise ValueError(f"--distribute takes no number where several processes share a run. Received: {devices}")
    if devices and found.replicas < devices:
        raise ValueError(f"--distribute must be at most the number of devices, {found.replicas}. Received: {devices}")
    return found
