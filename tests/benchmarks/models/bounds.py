"""What trimsfs is held to in first loads of models."""

from tests.benchmarks.budget import Budget
from tests.benchmarks.models import formulas
from tests.benchmarks.models.cases import FILE_READ, LLAMA, LLAMA_32, SMALL, TENSORS
from tests.benchmarks.models.loads import CPU, CPU_PER_GIB, SUM, WARM
from tests.benchmarks.models.places import BUSY_HTTP, BUSY_HTTPS, DISTANT, HTTPS
from tests.benchmarks.models.ways import DOWNLOADS
from tests.benchmarks.results import JUICEFS, PEERS, RCLONE, RUNAI, S3FS

BUSY = (BUSY_HTTPS, BUSY_HTTP)
OTHER_MOUNTS = (RCLONE, JUICEFS)

MODELS = (
    Budget(
        name="model, beside downloads",
        description="first load and inference of the Llama, https: time / time with the fastest download before it",
        formula=formulas.beside(SUM, (LLAMA, LLAMA_32), DOWNLOADS, HTTPS),
        bound=0.75,
    ),
    Budget(
        name="model, beside s3fs",
        description="the same: time / time with s3fs",
        formula=formulas.beside(SUM, (LLAMA, LLAMA_32), (S3FS,), HTTPS),
        bound=0.8,
    ),
    Budget(
        name="model, beside other mounts",
        description="the same: time / time with the fastest other mount, without s3fs",
        formula=formulas.beside(SUM, (LLAMA, LLAMA_32), OTHER_MOUNTS, HTTPS),
        bound=0.7,
    ),
    Budget(
        name="model, processor time",
        description="of the whole machine for it / with the cheapest download before it",
        formula=formulas.beside(CPU, (LLAMA, LLAMA_32), DOWNLOADS, HTTPS),
        bound=1.2,
    ),
    Budget(
        name="model, busy, beside downloads",
        description="the Llama on a host that computes, https and http: time / time with the fastest download",
        formula=formulas.beside(SUM, (LLAMA,), DOWNLOADS, *BUSY),
        bound=0.65,
    ),
    Budget(
        name="model, busy, beside s3fs",
        description="the same: time / time with s3fs",
        formula=formulas.beside(SUM, (LLAMA,), (S3FS,), *BUSY),
        bound=0.75,
    ),
    Budget(
        name="model, distant, beside downloads",
        description="the Llama at 25 ms and 90 MB/s for each connection: time / time with the fastest download",
        formula=formulas.beside(SUM, (LLAMA,), DOWNLOADS, DISTANT),
        bound=0.8,
    ),
    Budget(
        name="model, distant, beside other mounts",
        description="the same: time / time with the fastest other mount",
        formula=formulas.beside(SUM, (LLAMA,), PEERS, DISTANT),
        bound=0.7,
    ),
    Budget(
        name="model, distant, beside the wire",
        description="that time, less an inference from memory / time of the bytes on the wire",
        formula=formulas.beside_the_wire,
        bound=1.1,
    ),
    Budget(
        name="tensors, beside Run:ai's streamer",
        description="all tensors of the Llama in private memory, https: time / time by the streamer",
        formula=formulas.beside(SUM, (TENSORS,), (RUNAI,), HTTPS),
        bound=0.6,
    ),
    Budget(
        name="one file, beside other mounts",
        description="read for the first time, https: time / time with the fastest other mount",
        formula=formulas.beside(SUM, (FILE_READ,), PEERS, HTTPS),
        bound=0.8,
    ),
    Budget(
        name="one file, distant, beside other mounts",
        description="the same at 25 ms and 90 MB/s for each connection",
        formula=formulas.beside(SUM, (FILE_READ,), PEERS, DISTANT),
        bound=0.67,
    ),
    Budget(
        name="one file, processor time",
        description="of the machine without the server's, for a GiB, https",
        formula=formulas.ours(CPU_PER_GIB, FILE_READ, HTTPS),
        bound=1.5,
        unit="s",
    ),
    Budget(
        name="one file, busy, beside other mounts",
        description="on a host that computes, https and http: time / time with the fastest other mount",
        formula=formulas.beside(SUM, (FILE_READ,), PEERS, *BUSY),
        bound=1.0,
    ),
    Budget(
        name="what computes meanwhile",
        description="how fast it does beside trimsfs / beside s3fs, one file and Llama, https and http",
        formula=formulas.neighbours,
        bound=1.0,
        least=True,
    ),
    Budget(
        name="header, beside one GET",
        description="of a shard, near and distant: time / time of one GET of as many bytes",
        formula=formulas.header_beside_one_get,
        bound=1.5,
    ),
    Budget(
        name="first bytes over a slow link",
        description="of a shard, while the rest of its model is fetched, 25 ms and 25 MB/s in all",
        formula=formulas.first_bytes_while_fetching,
        bound=0.6,
        unit="s",
    ),
    Budget(
        name="small files, cold",
        description="300 files by name, one after the other, https: time / time of the fastest other mount",
        formula=formulas.beside(SUM, (SMALL,), PEERS, HTTPS),
        bound=0.7,
    ),
    Budget(
        name="small files, warm",
        description="the same again",
        formula=formulas.beside(WARM, (SMALL,), PEERS, HTTPS),
        bound=0.2,
    ),
)
