"""The store of snapshots: what is there, what goes, what stays when something is wrong."""

from __future__ import annotations

import errno
import os
import stat
from uuid import UUID, uuid4

import pytest

from agent.snapshots import errors, working_set
from agent.snapshots.store import SnapshotStore
from tests.snapshots.disk import (
    PAGES,
    Disk,
    capture,
    contents,
    description,
    flip,
    needed,
    page,
    pages_of,
    publish,
)


@pytest.fixture
def store(tmp_path):
    made = SnapshotStore(tmp_path / "store")
    made.prepare()
    made.collect(())
    return made


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def image(tmp_path):
    """Makes the disk of a VM."""

    def make(content=b"disk"):
        path = tmp_path / f"disk-{uuid4()}.qcow2"
        path.write_bytes(content)
        path.chmod(0o600)
        return path

    return make


def test_a_published_snapshot_is_what_was_put_in(store, image):
    """Memory, device state, layers and description come back; a second generation shares the first one's data."""
    first = publish(store, {1: 11, 2: 22, 9: 99}, disk=image(b"one"), state=b"s1")
    second = publish(store, {2: 0, 3: 33}, parent=first, disk=image(b"two"), state=b"s2")
    store = SnapshotStore(store.builds.parent)

    found = store.load(second.id)

    expected = {1: 11, 3: 33, 9: 99}
    assert pages_of(store, found) == b"".join(page(expected.get(each, 0)) for each in range(PAGES))
    assert found.state.read_bytes() == b"s2"
    assert [path.read_bytes() for path in found.layers] == [b"one", b"two"]
    assert found.manifest.description == description()
    assert (found.manifest.generation, found.header.parent) == (2, first.header.build)
    assert set(found.manifest.builds) == {first.header.build, second.header.build}
    assert {each.id for each in store.list()} == {first.id, second.id}


def test_files_are_read_only_and_directories_show_no_names(store, root, image):
    """Data is 0400 and root's, directories can be passed but not listed by others."""
    made = publish(store, {1: 1}, disk=image())
    for directory in (root, root / "builds", made.directory, store.build_directory(made.header.build)):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o711
    for path in (*made.directory.iterdir(), *store.build_directory(made.header.build).iterdir(), *made.layers):
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_uid) == (0o400, os.geteuid())


def test_data_names_and_manifest_reach_the_disk_in_that_order(store, root, image):
    """Files, then the directories they are in, then the manifest, its directory, the rename, the directory above."""
    with Disk(durable=True) as disk:
        made = publish(store, {1: 1, 2: 2}, disk=image())
        calls = [(name, target.removeprefix(f"{root}/")) for name, target in disk.calls]
    partial, build = f"snapshots/.partial-{made.id}", f"builds/{made.header.build}"
    layer = next(target for name, target in calls if name == "link")
    order = [
        ("sync", f"{build}/data"),
        ("sync", f"{build}/sums"),
        ("sync_directory", build),
        ("sync_directory", "builds"),
        ("sync_directory", "layers"),
        ("create", f"{partial}/manifest.json"),
        ("sync", f"{partial}/manifest.json"),
        ("sync_directory", partial),
        ("rename", f"snapshots/{made.id}"),
        ("sync_directory", "snapshots"),
    ]
    assert [call for call in calls if call in order] == order
    manifest = calls.index(("create", f"{partial}/manifest.json"))
    for name in ("mem.header", "vm.state"):
        assert ("sync", f"{partial}/{name}") in calls[:manifest]
    assert calls.index(("link", layer)) < manifest
    written = [target for name, target in calls[manifest:] if name in {"create", "write", "link", "make_directory"}]
    assert set(written) == {f"{partial}/manifest.json"}
    # The layer was synced under the name it had before: same file.
    assert any(name == "sync" and "/disk-" in target for name, target in calls[:manifest])


def test_a_removed_name_is_on_the_disk_before_its_data_goes(store, root, image):
    """After a power failure there is no snapshot without its data."""
    made = publish(store, {1: 1}, disk=image())
    with Disk() as disk:
        store.remove(made.id)
        calls = [(name, target.removeprefix(f"{root}/")) for name, target in disk.calls]
    assert calls[0][0] == "rename"
    assert calls[1] == ("sync_directory", "snapshots")
    assert contents(root) == set()


def test_a_draft_that_is_not_published_leaves_nothing(store, root, image):
    """Builds, layers and directory go; the disk that was to become a layer is again as it was."""
    disk = image()
    with store.draft(uuid4()) as draft:
        draft.add_layer(disk)
        assert stat.S_IMODE(disk.stat().st_mode) == 0o400
        draft.state_path.write_bytes(b"state")
        capture(draft, None, {1: 1})
    assert contents(root) == set()
    assert (disk.read_bytes(), stat.S_IMODE(disk.stat().st_mode), disk.stat().st_nlink) == (b"disk", 0o600, 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failure_anywhere_leaves_nothing_and_the_parent_as_it_was(store, root, image, code):
    """The disk is full, or broken, at every single operation of a pause, with real half-done writes."""
    parent = publish(store, {1: 1, 2: 2}, disk=image(b"below"))
    before = contents(root)
    kind = errors.HostDiskFull if code == errno.ENOSPC else errors.StoreFailed
    with Disk() as disk:
        number = 0
        while True:
            number += 1
            top = image(b"top")
            disk.fail_at(number, code)
            try:
                made = publish(store, {2: 0, 3: 3}, parent=parent, disk=top)
            except kind:
                disk.recover()
                if code == errno.ENOSPC or contents(root) != before:
                    store.collect(())
                assert contents(root) == before
                assert store.load(parent.id).manifest == parent.manifest
            else:
                break
    assert number > 20
    assert store.load(made.id).layers[-1].read_bytes() == b"top"


def test_a_full_disk_leaves_nothing_without_a_collection(store, root, image):
    """The undoing needs no room and no second call: the VM whose pause failed goes on, and so does the host."""
    with Disk() as disk:
        for number in range(1, 12):
            disk.fail_at(number)
            with pytest.raises(errors.HostDiskFull):
                publish(store, {2: 2}, disk=image())
            assert contents(root) == set(), f"operation {number}: {disk.calls[number - 1]}"


def test_an_id_is_used_once(store):
    """A snapshot that is there, or is being made, is not touched by a second one of its name."""
    made = publish(store, {1: 1})
    with pytest.raises(errors.SnapshotExists):
        publish(store, {1: 2}, snapshot_id=made.id)
    name = uuid4()
    with store.draft(name), pytest.raises(errors.SnapshotExists):
        store.draft(name)
    assert store.load(made.id).manifest == made.manifest


def test_a_snapshot_without_change_has_no_build_of_its_own(store, root):
    """An empty build is not kept; the generation counts on."""
    first = publish(store, {1: 1})
    second = publish(store, {}, parent=first)
    assert second.manifest.builds == first.manifest.builds
    assert (second.manifest.generation, contents(root)) == (2, needed([first, second]))


def test_copies_share_everything_and_live_alone(store, root, image):
    """A copy has its own name, kind and owner; removing the source takes nothing from it."""
    source = publish(store, {1: 1}, disk=image(b"layer"))
    working_set.write(source.working_set, working_set.combine(None, [(4096, 4096)]))
    made = store.copy(source.id, uuid4(), kind="sandbox", owner="me")
    assert (made.manifest.kind, made.manifest.owner, made.manifest.vmm) == ("sandbox", "me", "qemu 7.2")
    assert made.state.stat().st_ino == source.state.stat().st_ino
    store.remove(source.id)
    found = store.load(made.id)
    assert pages_of(store, found)[4096:8192] == page(1)
    assert found.layers[0].read_bytes() == b"layer"
    assert working_set.read(found.working_set).ranges() == ((4096, 4096),)
    assert contents(root) == needed([found])
    with pytest.raises(errors.SnapshotMissing):
        store.copy(source.id, uuid4(), kind="named", owner="")
    assert contents(root) == needed([found])


@pytest.mark.parametrize("again", [False, True])
def test_a_source_that_goes_while_it_is_copied_is_missing(store, root, image, monkeypatch, again):
    """Removed between being read and being linked, perhaps made anew under its id: never half of each."""
    source = publish(store, {1: 1}, disk=image())
    load = store.load

    def load_and_remove(snapshot_id):
        found = load(snapshot_id)
        store.remove(snapshot_id)
        if again:
            publish(store, {1: 2}, snapshot_id=snapshot_id)
        return found

    monkeypatch.setattr(store, "load", load_and_remove)
    with pytest.raises(errors.SnapshotMissing):
        store.copy(source.id, uuid4(), kind="named", owner="")
    with pytest.raises(errors.SnapshotMissing):
        store.compact(source.id if not again else publish(store, {1: 1}).id, uuid4())
    assert contents(root) == (needed([load(each.id) for each in store.list()]) if again else set())


def test_removing_keeps_what_others_refer_to(store, root, image):
    """The parent's data stays as long as a child needs it (trap 3), and goes with the last one."""
    first = publish(store, {1: 1, 2: 2}, disk=image(b"1"))
    second = publish(store, {2: 3}, parent=first, disk=image(b"2"))
    store.remove(first.id)
    assert contents(root) == needed([second])
    assert pages_of(store, store.load(second.id))[4096:12288] == page(1) + page(3)
    store.remove(second.id)
    store.remove(second.id)
    assert contents(root) == set()


def test_pinned_layers_outlive_their_snapshot_and_their_draft(store, root, image):
    """A VM runs on a layer of a removed snapshot, or of a checkpoint that failed after its disk was pivoted."""
    made = publish(store, {1: 1}, disk=image())
    store.pin("sandbox", made.manifest.layers)
    store.remove(made.id)
    store.collect(())
    assert contents(root) == {f"layers/{made.manifest.layers[0]}.qcow2"}
    with store.draft(uuid4()) as draft:
        layer = draft.add_layer(image(b"pivoted"))
        store.pin("other", [layer])
    assert store.layer_path(layer).read_bytes() == b"pivoted"
    store.pin("sandbox", ())
    store.collect([made.manifest.layers[0]])
    assert contents(root) == {f"layers/{each}.qcow2" for each in (layer, made.manifest.layers[0])}
    store.pin("other", ())
    store.collect(())
    assert contents(root) == set()


def test_nothing_is_collected_before_it_is_known_what_vms_use(store, root, image):
    """A restarted agent that removes a snapshot before it has adopted its VMs takes no layer from them."""
    made = publish(store, {1: 1}, disk=image())
    again = SnapshotStore(root)
    again.prepare()
    again.remove(made.id)
    assert contents(root) == needed([made]) - {f"snapshots/{made.id}"}
    again.collect(made.manifest.layers)
    assert contents(root) == {f"layers/{made.manifest.layers[0]}.qcow2"}


def test_drafts_keep_what_they_are_made_of(store, root, image):
    """A collection in the middle of a pause takes neither its new parts nor those of its parent, even if that goes."""
    parent = publish(store, {1: 1}, disk=image(b"below"))
    with store.draft(uuid4()) as draft:
        layer = draft.add_layer(image(b"top"))
        draft.state_path.write_bytes(b"state")
        capture(draft, parent.header, {2: 2})
        draft.hold((), parent.manifest.layers)
        store.remove(parent.id)
        store.collect(())
        made = draft.publish(description(), [*parent.manifest.layers, layer])
    assert contents(root) == needed([made])
    assert pages_of(store, store.load(made.id))[4096:12288] == page(1) + page(2)


def test_a_snapshot_of_what_is_gone_is_not_published(store, root):
    """A parent whose data was collected, a layer that never was: typed, and nothing is left."""
    parent = publish(store, {1: 1})
    store.remove(parent.id)
    with pytest.raises(errors.DataDamaged, match=str(parent.header.build)):
        publish(store, {2: 2}, parent=parent)
    with store.draft(uuid4()) as draft:
        draft.state_path.write_bytes(b"state")
        capture(draft, None, {1: 1})
        with pytest.raises(errors.LayerMissing):
            draft.publish(description(), [uuid4()])
    assert contents(root) == set()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("manifest.json", errors.ManifestDamaged),
        ("mem.header", errors.HeaderDamaged),
        ("vm.state", errors.StateDamaged),
        ("data", errors.DataDamaged),
        ("sums", errors.DataDamaged),
    ],
)
@pytest.mark.parametrize("harm", ["flip", "cut", "lengthen", "remove"])
def test_damage_is_refused_by_name_and_nothing_is_deleted(store, root, image, name, kind, harm):
    """A bit flipped, a file cut, lengthened or gone: a typed error that names the file; every file stays."""
    made = publish(store, {1: 1, 2: 2}, disk=image())
    directory = made.directory if (made.directory / name).exists() else store.build_directory(made.header.build)
    path = directory / name
    path.chmod(0o600)
    match harm:
        case "flip":
            flip(path, 8 * 40 + 3)
        case "cut":
            os.truncate(path, path.stat().st_size - 1)
        case "lengthen":
            path.write_bytes(path.read_bytes() + b"\0")
        case "remove":
            path.unlink()
    with pytest.raises(kind, match=str(path)):
        pages_of(store, store.load(made.id))
    if harm in {"cut", "remove"} and path.name != "sums":
        with pytest.raises(kind, match=str(path)):
            store.load(made.id)
    before = contents(root)
    other = publish(store, {7: 7})
    if name == "manifest.json":
        assert [each.id for each in store.list() if each.manifest is None and str(path) in each.damage] == [made.id]
        with pytest.raises(errors.ManifestDamaged):
            store.allocated_bytes(made.id)
        store.remove(other.id)  # its build could be the damaged one's too
        assert contents(root) == before | {f"builds/{other.header.build}"}
    else:
        store.remove(other.id)
        assert contents(root) == before
    store.remove(made.id)
    assert contents(root) == set()


def test_a_header_of_another_snapshot_is_refused(store):
    """One that is whole, of the same builds, generation and memory, but not the one that the manifest is of."""
    parent = publish(store, {1: 1, 2: 2})
    one, other = (publish(store, {number: 0}, parent=parent) for number in (1, 2))
    (one.directory / "mem.header").unlink()
    (one.directory / "mem.header").write_bytes(other.header.encode())
    with pytest.raises(errors.HeaderDamaged, match=f"{one.directory}/mem.header"):
        store.load(one.id)


def test_a_layer_that_is_gone_is_named(store, image):
    """The disk is checked too, before anything is started."""
    made = publish(store, {1: 1}, disk=image())
    made.layers[0].unlink()
    with pytest.raises(errors.LayerMissing, match=str(made.layers[0])):
        store.load(made.id)
    with pytest.raises(errors.LayerMissing):
        store.copy(made.id, uuid4(), kind="named", owner="")


def test_a_manifest_in_another_snapshots_place_is_refused(store):
    """The directory's name is the id."""
    made = publish(store, {1: 1})
    other = store.snapshot_directory(uuid4())
    made.directory.rename(other)
    with pytest.raises(errors.ManifestDamaged, match=str(other)):
        store.load(UUID(other.name))
    with pytest.raises(errors.SnapshotMissing):
        store.load(made.id)


def test_only_files_become_layers(store, tmp_path, image):
    """A link that a VMM put in its disk's place is not followed."""
    secret = image(b"secret")
    link = tmp_path / "link"
    link.symlink_to(secret)
    with store.draft(uuid4()) as draft:
        with pytest.raises(errors.StoreFailed):
            draft.add_layer(link)
        with pytest.raises(ValueError, match="no regular file"):
            draft.add_layer(tmp_path)


def test_foreign_names_stay(store, root):
    """What we did not name is not ours."""
    for directory in ("snapshots", "builds", "layers"):
        (root / directory / "lost+found").mkdir()
        (root / directory / "notes.txt").touch()
    before = contents(root)
    publish(store, {1: 1})
    store.remove(publish(store, {1: 1}).id)
    for each in store.list():
        store.remove(each.id)
    assert contents(root) == before


def test_size_is_what_is_allocated(store, image):
    """Blocks of the directory, its builds and its layers, not what a sparse file claims to be."""
    disk = image()
    os.truncate(disk, 1 << 30)
    made = publish(store, {each: each for each in range(100)}, disk=disk)
    assert 99 * 4096 <= store.allocated_bytes(made.id) < 1 << 20
    store.remove(made.id)
    with pytest.raises(errors.SnapshotMissing):
        store.allocated_bytes(made.id)


def test_a_draft_goes_with_its_process(store, root, image):
    """Leftovers of a killed process are dropped at the next start, and only those; of running drafts nothing is."""
    made = publish(store, {1: 1}, disk=image())
    draft = store.draft(uuid4())
    draft.add_layer(image())
    capture(draft, None, {5: 5})
    store.collect(())
    assert len(contents(root)) == len(needed([made])) + 3
    again = SnapshotStore(root)
    again.prepare()
    assert f"snapshots/.partial-{draft.id}" not in contents(root)
    again.collect(())
    assert contents(root) == needed([made])
    draft.close()
    with pytest.raises(ValueError, match="closed"):
        draft.publish(description(), ())
