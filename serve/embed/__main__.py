"""The command line of `python -m serve.embed`: a data set in, a table of embeddings out."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from contract.command_line import CommandLine, read_size, whole_number
from contract.errors import UserError, exit_status
from contract.signing import add_trust

EPILOG = """\
examples:
  python -m serve.embed /data/photos --bundle bundles/mine --output table
  python -m serve.embed '/data/in1k/train-{0000..0146}.tar' \\
      --bundle bundles/mine --outputs backbone_global clip_token --output table
  python -m serve.embed s3://bucket/list.parquet --column url \\
      --bundle bundles/mine --dtype float16 --output table
  python -m serve.embed list.txt --url gpu-server:8001 --output table
  python -m serve.embed /data/photos --bundle bundles/mine --output table \\
      --ray auto --workers 8

TABLE is a folder of Parquet files, which pyarrow, DuckDB and Polars read as one
table, or with --format lance a Lance table. A row a picture, in the data's
order: id (its place, from 0), uri, width and height (as the picture is held),
one column an output (lists of fixed size), error. A picture that is missing or
damaged has a reason there and embeddings of NaN (in Lance: null).

Parts appear whole. Killed or stopped, the same command goes on with the parts
that are missing. A TABLE of another bundle, other outputs or another list of
pictures is refused; of tar shards also if one has changed. Pictures that were
replaced under the same name are not noticed.

Paths in lists and parquets are below the list's folder or --root; URIs
(s3://, gs://, hf://, https://, …) are read with fsspec, which needs s3fs, gcsfs
and the like. Pictures are brought to the model's size as the bundle says (its
view), as serve.client does.

Exit status: 0 success, 1 server, storage or graph failed, 2 usage error.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    return exit_status(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    result = CommandLine(
        prog="python -m serve.embed",
        description="Embeddings of a whole data set, from a bundle or a running server.",
        epilog=EPILOG,
    )
    add = result.add_argument
    add(
        "data",
        nargs="+",
        metavar="DATA",
        help="a folder; tar shards (globs, {0000..0146}); lists of paths or URIs (.txt); parquets",
    )
    add("--output", type=Path, required=True, metavar="TABLE", help="folder of the table")
    add("--bundle", type=Path, metavar="BUNDLE", help="run this bundle's graphs in this process")
    add("--url", metavar="HOST:PORT", help="ask this server (gRPC) instead")
    add(
        "--outputs",
        nargs="+",
        default=["backbone_global"],
        metavar="NAME",
        help="(default: backbone_global); dense ones make large tables",
    )
    add("--column", metavar="NAME", help="column of a parquet with the paths or URIs")
    add("--root", metavar="PATH", help="what relative paths of lists are below of")
    add(
        "--dtype",
        default="float32",
        choices=("float32", "float16"),
        help="of the embeddings (default: float32)",
    )
    add(
        "--format",
        default="parquet",
        choices=("parquet", "lance"),
        help="of the table (default: parquet)",
    )
    add(
        "--part-rows",
        type=whole_number(1, 2**24),
        metavar="N",
        help="rows of a part (default: 4096, fewer for dense outputs)",
    )
    add(
        "--view",
        metavar="POLICY",
        help="how pictures are brought to the model's size: squash, centre-crop:SHARE or letterbox "
        "(default: the bundle's)",
    )
    add("--size", metavar="HxW", help="pixels, for models of dynamic resolution")
    add("--batch", type=whole_number(1, 4096), metavar="N", help="pictures a batch (default: 32)")
    add(
        "--decoders",
        type=whole_number(1, 1024),
        metavar="N",
        help="threads that read and decode (default: one a core, 16 for URIs)",
    )
    local = result.add_argument_group("with --bundle")
    local.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "gpu"),
        help="(default: a GPU where onnxruntime-gpu finds one)",
    )
    local.add_argument(
        "--runtime",
        default="auto",
        choices=("auto", "openvino", "onnxruntime"),
        help="(default: OpenVINO on CPUs where it is installed)",
    )
    local.add_argument(
        "--threads",
        type=whole_number(1, 1024),
        metavar="N",
        help="CPU threads of the graphs (default: one a core)",
    )
    add_trust(local)
    server = result.add_argument_group("with --url")
    server.add_argument(
        "--concurrency",
        type=whole_number(1, 1024),
        default=4,
        metavar="N",
        help="requests at once (default: 4)",
    )
    server.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="seconds a request (default: 30)"
    )
    if importlib.util.find_spec("tritonclient"):  # else --url says what is missing
        from serve.client.tls import add_tls

        add_tls(server)
    cluster = result.add_argument_group("on a cluster")
    cluster.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="as a Ray Data job: on the cluster at ADDRESS (auto: the running one), else here; "
        "workers need DATA, BUNDLE and TABLE under the same paths",
    )
    cluster.add_argument(
        "--workers",
        type=whole_number(1, 65536),
        metavar="N",
        help="processes that embed, of --threads CPUs each (default: as many as there is room for)",
    )
    return result


def _run(args: argparse.Namespace) -> int:
    if (args.bundle is None) == (args.url is None):
        raise UserError(
            "give --bundle BUNDLE or --url HOST:PORT, "
            + ("one of the two" if args.bundle is None else "not both")
        )
    if args.workers and args.ray is None:
        raise UserError(f"--workers {args.workers} is for --ray: add it, or leave it out")
    _need("pyarrow", "embed")
    _need("fsspec", "embed")
    if args.format == "lance":
        _need("lance", "lance")
    if args.ray is not None:
        _need("ray", "ray")
    if args.url:
        _need("tritonclient", "client")
    from serve.embed.data import is_uri
    from serve.embed.features import Source
    from serve.embed.job import Cluster, Job, run
    from serve.repository.settings import cores

    source = Source(
        outputs=tuple(dict.fromkeys(args.outputs)),
        bundle=args.bundle,
        trust=tuple(args.trust),
        device=args.device,
        runtime=args.runtime,
        threads=args.threads or cores(),
        url=args.url,
        client=_client_options(args) if args.url else (),
        concurrency=args.concurrency,
        batch=args.batch,
        size=read_size(args.size),
        view=args.view,
    )
    waits = any(is_uri(one) or one.endswith((".parquet", ".txt")) for one in args.data)
    job = Job(
        data=tuple(args.data),
        source=source,
        output=args.output,
        column=args.column,
        root=args.root,
        dtype=args.dtype,
        format=args.format,
        part_rows=args.part_rows,
        decoders=args.decoders or max(cores(), 16 if waits else 1),
    )
    return run(job, None if args.ray is None else Cluster(args.ray or None, args.workers))


def _need(module: str, extra: str) -> None:
    """Raise UserError where a library is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{module} is not installed: pip install 'vfm-distill[{extra}]'")


def _client_options(args: argparse.Namespace) -> tuple[tuple[str, object], ...]:
    from serve.client.tls import read_tls

    return ("timeout", args.timeout), ("tls", read_tls(args))


if __name__ == "__main__":
    sys.exit(main())
