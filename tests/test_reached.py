"""Ceilings of a device, shares of them, and predictions for other devices."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran
from sample_results import sample_result

from edgedistill import ceilings_child, library
from edgedistill.ceilings import measure_ceilings
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.reached import predict
from edgedistill.result_file import Result, read_result, write_result
from edgedistill.result_set import Named, read_all
from edgedistill.target import load_target

MB, PARAMETERS = 100e6, 100e6


def on_device(fingerprint: str, bandwidth: float, compute: float, decode: float) -> Result:
    """A file of 100 MB and 100 million parameters; prefill is ten times decode, as made."""
    result = sample_result(decode=decode, fingerprint=fingerprint, noise=0)
    roof: dict[str, Any] = {
        "bandwidth_gb_s": bandwidth,
        "compute_gflops": compute,
        "threads": 2,
        "method": "by hand",
        "bytes_per_token": MB,
        "flops_per_token": 2 * PARAMETERS,
        "decode_share": result.figures["tg128"].value * MB / (bandwidth * 1e9),
        "prefill_share": result.figures["pp512"].value * 2 * PARAMETERS / (compute * 1e9),
    }
    return replace(result, roofline=roof)


def named(*results: Result) -> list[Named]:
    return [Named(f"r{i}", Path(f"r{i}.json"), each) for i, each in enumerate(results)]


def test_a_device_twice_as_fast() -> None:
    """Half the bandwidth gave 50 tokens/s of 100; the same share of twice that gives 100, and 80
    were measured: 25 % too many. The other way round 40 are predicted, of 50: 20 % too few."""
    slow, fast = on_device("a", 10, 100, 50), on_device("b", 20, 100, 80)
    found = predict(named(slow, fast), [])
    first, second = found.checked
    assert first.decode == pytest.approx(100, rel=0.03)
    assert first.decode_error == pytest.approx(0.25, rel=0.1)
    assert second.decode_error == pytest.approx(-0.2, rel=0.1)
    assert found.worst_decode_error == first.decode_error
    assert found.reached[0].decode_share == pytest.approx(0.5, rel=0.03)


def test_a_target_by_its_profile() -> None:
    phone = load_target(library.find("target", "phone"))
    assert phone.roofline is not None
    found = predict(named(on_device("a", 10, 100, 50)), [phone])
    (there,) = found.targets
    assert there.on == "phone"
    assert there.decode == pytest.approx(0.5 * phone.roofline.bandwidth_gb_s * 1e9 / MB, rel=0.03)
    assert there.prefill == pytest.approx(phone.roofline.compute_gflops * 1e9 / 2 / PARAMETERS)
    assert there.decode_error is None
    assert "how far these predictions are off is not known" in found.notes[1]


def test_a_profile_that_reaches_less() -> None:
    """90 % were reached here, and the phone's profile says 55."""
    phone = load_target(library.find("target", "phone"))
    assert phone.roofline is not None
    (there,) = predict(named(on_device("a", 10, 100, 90)), [phone]).targets
    efficient = phone.roofline.efficiency * phone.roofline.bandwidth_gb_s
    assert there.decode == pytest.approx(efficient * 1e9 / MB)


def test_another_file_is_no_check() -> None:
    other = replace(on_device("b", 20, 100, 80), model={"name": "x", "sha256": "y", "bytes": 1})
    assert predict(named(on_device("a", 10, 100, 50), other), []).checked == []


def test_a_result_without_ceilings() -> None:
    with pytest.raises(ArtifactError, match="no ceilings of its device"):
        predict(named(sample_result()), [])


def test_a_target_without_them() -> None:
    targets = [load_target(library.find("target", n)) for n in ("laptop", "phone", "browser")]
    with pytest.raises(UsageError) as raised:
        predict(named(on_device("a", 10, 100, 50)), targets)
    assert raised.value.what == "nothing is said of memory and compute by laptop, browser"
    assert "metal, phone, phone-onnx, raspberry-pi-5" in str(raised.value.hint)


def test_what_a_disturbed_sitting_reached_is_the_least(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    busy = on_device("a", 10, 100, 50)
    write_result(replace(busy, load={"busy": True}), tmp_path / "a.json")
    write_result(on_device("b", 20, 100, 80), tmp_path / "b.json")
    found = run("predict", str(tmp_path), "--target", "phone")
    assert found.out.count("at least ") == 2  # its shares
    assert "largest error" not in found.out
    (there, *_, back) = predict(read_all([tmp_path]), []).checked
    assert (there.decode_error, back.prefill_error) == (None, None)


def test_sittings_with_fewer_threads_than_cores_say_so() -> None:
    here = on_device("a", 10, 100, 50)
    few = replace(here, settings={"threads": 1}, device={**here.device, "physical_cores": 16})
    (said, _) = predict(named(few), []).notes
    assert "measured with 1 of 16 cores" in said


def test_ceilings_of_this_machine() -> None:
    """Of the size of a product and a read timed here, by as many threads as a BLAS takes, other
    work or not; test_ceilings.py holds the units exactly."""
    import numpy as np

    found = measure_ceilings(1)
    assert found is not None
    matrix, array = np.ones((1024, 1024), np.float32), np.ones(16_000_000, np.float32)
    flops = 2 * 1024**3 / least(lambda: matrix @ matrix)
    read = array.nbytes / least(lambda: np.dot(array, array))
    assert 1 / 20 < found.compute_gflops * 1e9 / flops < 20
    assert 1 / 20 < found.bandwidth_gb_s * 1e9 / read < 20


def least(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def test_all_threads_count() -> None:
    """Work that only waits takes as long on two threads as on one, so twice as much is done."""
    one = ceilings_child._best(lambda _: time.sleep(0.05), 1, 1)
    two = ceilings_child._best(lambda _: time.sleep(0.05), 2, 1)
    assert two < 1.8 * one


@pytest.mark.parametrize("value", [0, -1, None, "9"])
def test_a_damaged_roofline(tmp_path: Path, value: Any) -> None:
    result = on_device("a", 10, 100, 50)
    write_result(result, tmp_path / "r.json")
    held = json.loads((tmp_path / "r.json").read_text("utf-8"))
    held["roofline"]["decode_share"] = value
    (tmp_path / "r.json").write_text(json.dumps(held), "utf-8")
    with pytest.raises(ArtifactError, match=r"roofline\.decode_share is no number above 0"):
        read_result(tmp_path / "r.json")


def test_a_result_of_before(tmp_path: Path) -> None:
    write_result(sample_result(), tmp_path / "r.json")
    held = json.loads((tmp_path / "r.json").read_text("utf-8"))
    del held["roofline"]
    (tmp_path / "r.json").write_text(json.dumps(held), "utf-8")
    assert read_result(tmp_path / "r.json").roofline is None


def test_the_command(run: Callable[..., Ran], tmp_path: Path) -> None:
    write_result(on_device("a", 10, 100, 50), tmp_path / "a.json")
    write_result(on_device("b", 20, 100, 80), tmp_path / "b.json")
    done = run("predict", str(tmp_path), "--target", "phone")
    assert done.code == 0, done.err
    for said in ("predicted for", "phone", "checked on", "largest error: decode +2"):
        assert said in done.out
