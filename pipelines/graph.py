"""A job's graph as a remote runner gets it: described, checked against what such a runner can take, written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from schemas.errors import TamisError

# Dataflow takes job descriptions up to 10 MB; a graph of ours has tens of kilobytes whatever the corpus, for the
# plan lies in the output folder and not in the graph.
MAX_BYTES = 10_000_000


@dataclass(frozen=True)
class Graph:
    """What a graph holds.

    Attributes:
        stages: Labels of the transforms a reader of the job would name, in order.
        shuffles: Full names of the transforms that group by key.
        images: Worker images.
        coders: Classes of the coders that Beam does not know itself.
        bytes: Size of the whole as a message.
        pickled: Size of the largest pickled function.
    """

    stages: tuple[str, ...]
    shuffles: tuple[str, ...]
    images: tuple[str, ...]
    coders: tuple[str, ...]
    bytes: int
    pickled: int

    def __str__(self) -> str:
        images = ", ".join(self.images) or "no worker image"
        return f"{len(self.stages)} stages ({' > '.join(self.stages)}), {images}, {self.bytes / 1000:.0f} kB"


def describe_graph(proto: Any) -> Graph:
    """Describe a pipeline proto.

    Args:
        proto: `beam_runner_api_pb2.Pipeline`.
    """
    from apache_beam.portability.api import beam_runner_api_pb2 as api
    from apache_beam.portability.common_urns import environments, primitives

    parts = proto.components
    roots = [parts.transforms[name] for name in proto.root_transform_ids]
    top = [parts.transforms[s] for r in roots for s in r.subtransforms] if len(roots) == 1 else roots
    images = {
        api.DockerPayload.FromString(e.payload).container_image
        for e in parts.environments.values()
        if e.urn == environments.DOCKER.urn
    }
    pickled = [
        len(api.ParDoPayload.FromString(t.spec.payload).do_fn.payload)
        for t in parts.transforms.values()
        if t.spec.urn == primitives.PAR_DO.urn
    ]
    return Graph(
        stages=tuple(t.unique_name for t in top if t.subtransforms or t.spec.urn),
        shuffles=tuple(
            sorted(
                t.unique_name for t in parts.transforms.values() if t.spec.urn == primitives.GROUP_BY_KEY.urn
            )
        ),
        images=tuple(sorted(images)),
        coders=tuple(sorted(_coders(proto))),
        bytes=proto.ByteSize(),
        pickled=max(pickled, default=0),
    )


def check_graph(graph: Graph) -> None:
    """Refuse a graph that a remote runner would refuse or never finish.

    Raises:
        TamisError: It is too large, or names no worker image.
    """
    if graph.bytes > MAX_BYTES:
        raise TamisError(
            f"the job's graph has {graph.bytes} bytes, and runners take {MAX_BYTES}: "
            "give a long word list as a file, not as a setting"
        )
    if not graph.images:
        raise TamisError(
            "the job's graph names no worker image; pass --sdk_container_image=REGISTRY/tamis:VERSION"
        )


def write_graph(proto: Any, url: str) -> None:
    """Write a pipeline proto as JSON, to any URL fsspec knows."""
    import fsspec
    from google.protobuf import json_format

    with fsspec.open(url, "wb") as file:
        file.write(json_format.MessageToJson(proto).encode())


def _coders(proto: Any) -> set[str]:
    """Classes of the pickled coders."""
    from apache_beam.coders import Coder
    from apache_beam.runners.pipeline_context import PipelineContext

    context = PipelineContext(proto.components)
    found = {type(context.coders.get_by_id(i)) for i in proto.components.coders}
    return {f"{c.__module__}.{c.__qualname__}" for c in found if issubclass(c, Coder) and not _is_beams(c)}


def _is_beams(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "apache_beam"
