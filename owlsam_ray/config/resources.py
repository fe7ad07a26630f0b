"""Section `resources`: actors, batches, memory and deadlines; none of them changes a label."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from owlsam_ray.config import rules
from owlsam_ray.config.base import Auto, Name, PositiveInt, Section


class ResourcesConfig(Section):
    """Where and how fast the run works. `device`, `dtype` and the batch sizes are also part of the numerics id."""

    RULES: ClassVar = rules.RESOURCES

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if available."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the image encoders."""
    actors: PositiveInt | Auto = "auto"
    """Processes that each hold both models; `auto`: one per GPU, or one on a CPU machine."""
    cpus_per_actor: Annotated[float, Field(gt=0)] | Auto = "auto"
    """CPUs that Ray reserves for one actor; `auto`: what fetch and write leave, at most 8 beside a GPU."""
    gpus_per_actor: Annotated[float, Field(ge=0)] | Auto = "auto"
    """GPUs that Ray reserves for one actor; 0 on a CPU."""
    detector_batch: PositiveInt | Auto = "auto"
    """Images per detector call; `auto`: 4 on a CPU, 32 on a GPU."""
    segmenter_batch: PositiveInt | Auto = "auto"
    """Images per encoder call; `auto`: 2 on a CPU, 16 on a GPU (4 with `segment.model: sam`)."""
    decoder_batch: PositiveInt | Auto = "auto"
    """Boxes per mask decoder call, rounded up to a multiple of 8; `auto`: 16 on a CPU, 128 on a GPU."""
    decode_threads: PositiveInt | Auto = "auto"
    """Threads of an actor that decode images and encode masks; `auto`: its CPUs, at least 2."""
    torch_threads: PositiveInt | Auto = "auto"
    """Threads of one model call on a CPU, where they are part of the numerics id. `auto`: a power of two, at most 8 and
    at most the CPUs. Only powers of two keep results independent of a row's position in its batch."""
    shards_in_flight: PositiveInt = 2
    """Shards that one actor works on at once, so that the model never waits at the end of a shard."""
    shard_size: PositiveInt | Auto = "auto"
    """Images per shard, frozen by the plan; `auto`: images / 64, clamped to 8…1024 and to `shard_max_mb`."""
    shard_max_mb: PositiveInt = 256
    """Maximum encoded size of an `auto` shard, in MB."""
    wave_shards: PositiveInt = 1000
    """Shards that are submitted to Ray at a time."""
    fetch_threads: PositiveInt = 16
    """Files that one fetch task reads concurrently."""
    fetch_cpus: Annotated[float, Field(gt=0)] = 0.5
    """CPUs of a fetch task. Must differ from the actor's CPUs, or Ray would fuse the two."""
    write_cpus: Annotated[float, Field(gt=0)] = 0.25
    """CPUs of a write task."""
    num_cpus: PositiveInt | None = None
    """CPUs of the Ray instance started here; default: the machine's."""
    object_store_mb: PositiveInt | None = None
    """Object store size of the Ray instance started here, in MiB (2²⁰ bytes); default: Ray's own."""
    ray_address: Name | None = None
    """An existing cluster (`auto`, `ip:port`, `ray://…`); default: start one on this machine."""
    auth_mode: Literal["disabled", "token"] = "disabled"
    """RAY_AUTH_MODE of the cluster at `ray_address`; `token` needs the same token on every node. A Ray instance started
    here always requires its own token."""
    grace_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds that shards in progress get to finish after SIGINT, SIGTERM or SIGUSR1."""
    heartbeat_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between two heartbeats of an attempt."""
    takeover_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a heartbeat after which the next attempt takes over; it waits that long first."""
    image_deadline_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that decoding or encoding one image, or one model call, may take. An actor that hangs for longer is
    ended, and the image that caused it is found and quarantined."""
    fetch_deadline_s: Annotated[float, Field(gt=0)] = 900.0
    """Seconds without a single image arriving in a shard's fetch, after which the remaining images fail as
    `fetch_timeout` and are retried at the end."""
    actor_memory_gb: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Gigabytes (10⁹ bytes) of an actor's own memory; above, it is ended as if it hung. `auto`: 80 % of the node's."""
