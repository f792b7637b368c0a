"""List the table formats that can be read, by name."""

from typing import Final

from readapt_ray.sources.arrow_files import Arrow, Parquet
from readapt_ray.sources.delimited import Csv, Tsv
from readapt_ray.sources.json_files import JsonLines, JsonValues
from readapt_ray.sources.tables import TableFormat

FORMATS: Final[dict[str, TableFormat]] = {
    "jsonl": JsonLines(),
    "json": JsonValues(),
    "csv": Csv(),
    "tsv": Tsv(),
    "parquet": Parquet(),
    "arrow": Arrow(),
}
