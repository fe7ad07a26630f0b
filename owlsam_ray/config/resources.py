"""Section `resources`: actors, batches, memory and deadlines; nothing here changes a label."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from owlsam_ray.config.base import Auto, Name, PositiveInt, Section


class ResourcesConfig(Section):
    """Where and how fast. `device`, `dtype` and the batch sizes are also part of the numerics id."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the image towers."""
    actors: PositiveInt | Auto = "auto"
    """Processes that hold both models; `auto`: one per GPU, or one on a CPU machine."""
    cpus_per_actor: Annotated[float, Field(gt=0)] | Auto = "auto"
    """CPUs that Ray reserves for one actor; `auto`: what fetch and write leave, at most 8 beside a GPU."""
    gpus_per_actor: Annotated[float, Field(ge=0)] | Auto = "auto"
    """GPUs that Ray reserves for one actor; 0 on a CPU."""
    detector_batch: PositiveInt | Auto = "auto"
    """Images in one detector call; `auto`: 4 on a CPU, 32 on a GPU."""
    segmenter_batch: PositiveInt | Auto = "auto"
    """Images in one encoder call; `auto`: 2 on a CPU, 16 on a GPU (4 with `segment.model: sam`)."""
    decoder_batch: PositiveInt | Auto = "auto"
    """Boxes in one mask decoder call, rounded up to a multiple of 8; `auto`: 16 on a CPU, 128 on a GPU."""
    decode_threads: PositiveInt | Auto = "auto"
    """Threads in an actor that decode images and encode masks; `auto`: its CPUs, at least 2."""
    torch_threads: PositiveInt | Auto = "auto"
    """Threads of one model call on a CPU; part of the numerics id there. `auto`: a power of two, at most 8 and at most
    the CPUs. Powers of two only keep results free of a row's place in its batch."""
    shards_in_flight: PositiveInt = 2
    """Shards that one actor works on at once, so that the model never waits at a shard's end."""
    shard_size: PositiveInt | Auto = "auto"
    """Images in a shard, frozen at plan; `auto`: images / 64, clamped to 8…1024 and to `shard_max_mb`."""
    shard_max_mb: PositiveInt = 256
    """Encoded bytes that an `auto` shard may hold."""
    wave_shards: PositiveInt = 1000
    """Shards that are handed to Ray at a time."""
    fetch_threads: PositiveInt = 16
    """Files that one fetch task reads at once."""
    fetch_cpus: Annotated[float, Field(gt=0)] = 0.5
    """CPUs of a fetch task. Must differ from the actor's, or Ray would fuse the two."""
    write_cpus: Annotated[float, Field(gt=0)] = 0.25
    """CPUs of a write task."""
    num_cpus: PositiveInt | None = None
    """CPUs of the Ray instance that is started here; default: the machine's."""
    object_store_mb: PositiveInt | None = None
    """Object store of the Ray instance that is started here; default: Ray's own."""
    ray_address: Name | None = None
    """An existing cluster (`auto`, `ip:port`, `ray://…`); default: start one on this machine."""
    auth_mode: Literal["disabled", "token"] = "disabled"
    """RAY_AUTH_MODE of the cluster at `ray_address`; `token` needs the same token on every node. A Ray that is started
    here always asks for a token of its own."""
    grace_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds that shards in hand get to finish after SIGINT, SIGTERM or SIGUSR1."""
    heartbeat_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between two signs of life of an attempt."""
    takeover_s: Annotated[float, Field(gt=0)] = 60.0
    """An attempt without a sign of life for so long is taken over by the next one, which waits that long for it."""
    image_deadline_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that one image may take to be decoded or encoded, or one call of a model; an actor that hangs for longer
    is ended, and the image that did it is found and quarantined."""
    fetch_deadline_s: Annotated[float, Field(gt=0)] = 900.0
    """Seconds of a shard's fetching in which not a single image arrives, after which the rest fails as
    `fetch_timeout`, to be tried again at the end."""
    actor_memory_gb: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Gigabytes (10⁹ bytes) of an actor's own memory; above, it is ended as if it hung. `auto`: 80 % of the node's."""

    @model_validator(mode="after")
    def _several_beats(self) -> Self:
        if self.takeover_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"takeover_s {self.takeover_s:g} is less than two times heartbeat_s {self.heartbeat_s:g}: an attempt "
                "that lives would be taken over"
            )
        return self
