"""Ray's workers read S3 by settings that only the driver's environment has."""

from __future__ import annotations

import json

import boto3
import pytest

from rayrm.data.ingest import ingest
from rayrm.data_settings import SourceConfig
from tests.s3 import s3_server
from tests.tiny import tiny_rows, tiny_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_ray_workers_read_what_the_drivers_environment_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny_rows(60)
    with s3_server() as url:
        # The cluster's processes were started before.
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="pairs")
        for part in range(3):
            renamed = [{"good" if name == "chosen" else name: row[name] for name in row} for row in rows]
            body = "".join(json.dumps(row) + "\n" for row in renamed[part * 20 : part * 20 + 20])
            client.put_object(Bucket="pairs", Key=f"data/{part}.jsonl", Body=body.encode())
        source = SourceConfig(path="s3://pairs/data", columns={"chosen": "good"}, max_pairs=50)
        there = ingest(source, tiny_tokenizer(), max_length=None)
    here = ingest(rows[:50], tiny_tokenizer(), max_length=None)
    assert there.report.num_accepted == 50
    assert there.report.fingerprint == here.report.fingerprint
