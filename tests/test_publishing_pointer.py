import json

import pytest

from hedwig import storage
from hedwig.publishing import (
    growing_version,
    list_versions,
    pointer_token,
    publish,
    published_folder,
    read_pointer,
    rollback,
)


def make(run, version, num):
    folder = run if version == "." else run / version
    for name in ("embeddings", "index"):
        storage.write_bytes(str(folder / name / "part-0.bin"), b"x" * num)
        storage.publish(
            str(folder / name), kind=name, config={"num": num}, inputs={}, num_in=num, num_out=num,
            details={"model_id": f"m{num}"},
        )  # fmt: skip


def fine(folder):
    return None


def test_a_run_without_a_pointer_is_itself(tmp_path):
    make(tmp_path, ".", 3)
    assert read_pointer(str(tmp_path)) is None
    assert pointer_token(str(tmp_path)) is None
    assert published_folder(str(tmp_path)) == str(tmp_path)
    assert growing_version(str(tmp_path)) == "."


def test_publish_then_a_newer_version_then_back(tmp_path):
    run = str(tmp_path)
    make(tmp_path, ".", 3)
    first = publish(run, fine)
    assert (first.current.version, first.current.model_id, first.current.num_panoramas) == (".", "m3", 3)
    assert first.current.artefacts["index"] == storage.manifest_digest(str(tmp_path / "index"))
    assert growing_version(run) == "versions/0002"  # new work goes beside what is published
    make(tmp_path, "versions/0002", 5)
    assert growing_version(run) == "versions/0002"  # and goes on there until it is published
    assert published_folder(run) == run  # which growing does not change
    checked = []
    token = pointer_token(run)
    second = publish(run, checked.append)
    assert checked == [str(tmp_path / "versions" / "0002")]
    assert second.current.num_panoramas == 5
    assert published_folder(run) == checked[0]
    assert pointer_token(run) != token
    assert [p.version for p in second.history] == ["."]
    assert growing_version(run) == "versions/0003"
    back = rollback(run)
    assert back.current == first.current
    assert [p.version for p in back.withdrawn] == ["versions/0002"]
    assert published_folder(run) == run
    assert growing_version(run) == "versions/0003"  # a withdrawn version is not written into
    with pytest.raises(FileNotFoundError, match=r"was published in .* before"):
        rollback(run)
    with pytest.raises(FileNotFoundError, match="no version that was not published before"):
        publish(run, fine)  # a withdrawn version only comes back by its name
    again = publish(run, fine, "versions/0002")
    assert (again.current.version, again.withdrawn) == ("versions/0002", ())


def test_parts_that_do_not_belong_together_are_not_published(tmp_path):
    make(tmp_path, ".", 3)

    def refuse(folder):
        raise ValueError("index is old")

    with pytest.raises(ValueError, match="index is old"):
        publish(str(tmp_path), refuse)
    assert read_pointer(str(tmp_path)) is None


def test_publishing_the_same_again_changes_nothing(tmp_path):
    make(tmp_path, ".", 3)
    first = publish(str(tmp_path), fine)
    assert publish(str(tmp_path), fine, ".") == first


def test_a_published_artefact_that_was_changed_is_refused(tmp_path):
    make(tmp_path, ".", 3)
    publish(str(tmp_path), fine)
    make(tmp_path, ".", 4)
    with pytest.raises(ValueError, match="is not what was published"):
        published_folder(str(tmp_path))


@pytest.mark.parametrize("version", ["../elsewhere", "versions/../../x", "/etc", "versions/1"])
def test_a_pointer_cannot_lead_out_of_its_run(tmp_path, version):
    make(tmp_path, ".", 3)
    publish(str(tmp_path), fine)
    path = tmp_path / "published.json"
    content = json.loads(path.read_text())
    content["current"]["version"] = version
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"neither '\.' nor versions/NNNN"):
        published_folder(str(tmp_path))


def test_versions_are_in_the_order_of_their_numbers(tmp_path):
    make(tmp_path, ".", 1)
    for name in ("0002", "10000", "0010"):
        make(tmp_path, f"versions/{name}", 1)
    (tmp_path / "versions" / "scratch").mkdir()
    assert list_versions(str(tmp_path)) == [".", "versions/0002", "versions/0010", "versions/10000"]
