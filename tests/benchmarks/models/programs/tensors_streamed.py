"""As `tensors`, by Run:ai's streamer from ``s3://BUCKET/DIRECTORY``, without files."""

from collections.abc import Callable

from runai_model_streamer import SafetensorsStreamer, list_safetensors

from tests.benchmarks.models.programs.common import serve
from tests.benchmarks.models.programs.tensors import digest


def load(path: str) -> Callable[[], bytes]:
    """All tensors, whose memory is this process's own: the streamer's default."""
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(sorted(list_safetensors(path)))
        tensors = dict(streamer.get_tensors())
    return lambda: digest(tensors)


if __name__ == "__main__":
    serve(load, infers=False)
