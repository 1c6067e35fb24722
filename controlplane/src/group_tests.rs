//! What is refused of groups and disks, and that the refusal names it.

use super::*;
use crate::model::Txn;
use crate::objects::{Disk, Object, Policy};
use crate::policy::{Promises, Wanted};

pub(crate) fn proxy(id: &str, address: &str) -> Proxy {
    Proxy {
        uid: new_uid(),
        tenant: "default".into(),
        id: id.into(),
        version: 1,
        created_ns: 0,
        pin: "00".repeat(32),
        previous_pin: None,
        expire_time_ns: 0,
        data_address: address.into(),
        nbd_addresses: vec![],
        capabilities: vec![],
        boot_id: String::new(),
        software_version: String::new(),
        renew_time_ns: 0,
        site: String::new(),
    }
}

pub(crate) fn policy(id: &str, wanted: &Wanted) -> Policy {
    Policy {
        uid: new_uid(),
        tenant: "default".into(),
        id: id.into(),
        version: 1,
        created_ns: 0,
        updated_ns: 0,
        description: String::new(),
        promises: Promises::new(wanted).unwrap(),
    }
}

/// The first disk of a group.
pub(crate) fn first_disk(group: &Group) -> Disk {
    Disk {
        uid: new_uid(),
        group_uid: group.uid.clone(),
        id: "data".into(),
        slot: 0,
        path: "/d".into(),
        serial: "s".into(),
        size: 4096,
        block: 512,
        physical_block: 4096,
        export_name: format!("{}/data", group.id),
        created_ns: 1,
        leaving: false,
        seed_path: String::new(),
    }
}

fn model() -> Model {
    let mut txn = Txn::default();
    txn.put(Object::Proxy(proxy("src", "")));
    txn.put(Object::Proxy(proxy("dr", "dr:7070")));
    txn.put(Object::Policy(policy("gold", &Wanted::default())));
    Model::default().applied(txn, 1)
}

fn asked() -> v1::Group {
    v1::Group {
        policy: "tenants/default/policies/gold".into(),
        source: "tenants/default/proxies/src".into(),
        target: "tenants/default/proxies/dr".into(),
        ..v1::Group::default()
    }
}

fn shop() -> Name {
    Name::new("default", Kind::Group, "shop")
}

fn refusal(group: v1::Group) -> String {
    new_group(&model(), &shop(), &group, 1).unwrap_err().to_string()
}

fn disk(path: &str) -> v1::Disk {
    v1::Disk { name: "data".into(), path: path.into(), ..v1::Disk::default() }
}

const FOUND: Found = Found { size: 1 << 30, block: 512, physical_block: 4096 };

#[test]
fn a_group_that_fits_is_taken() {
    let group = new_group(&model(), &shop(), &asked(), 1).unwrap();
    assert_eq!((group.generation, group.writer_generation, group.hold), (1, 1, false));
}

#[test]
fn what_does_not_exist_is_named() {
    let text = refusal(v1::Group { policy: "tenants/default/policies/tin".into(), ..asked() });
    assert!(text.contains("no policy") && text.contains("tin"), "{text}");
    let text = refusal(v1::Group { source: "tenants/default/proxies/nobody".into(), ..asked() });
    assert!(text.contains("no proxy") && text.contains("nobody"), "{text}");
}

#[test]
fn a_target_that_is_the_source_is_refused() {
    let mut model = model();
    let mut both = proxy("src", "src:7070");
    both.version = 2;
    let mut txn = Txn::default();
    txn.put(Object::Proxy(both));
    model = model.applied(txn, 2);
    let group = v1::Group { target: "tenants/default/proxies/src".into(), ..asked() };
    let text = new_group(&model, &shop(), &group, 1).unwrap_err().to_string();
    assert!(text.contains("group.target"), "{text}");
}

#[test]
fn a_target_that_takes_no_streams_is_refused() {
    let group = v1::Group {
        source: "tenants/default/proxies/dr".into(),
        target: "tenants/default/proxies/src".into(),
        ..asked()
    };
    assert!(refusal(group).contains("not taking streams"));
}

#[test]
fn another_tenants_objects_are_refused() {
    let text = refusal(v1::Group { policy: "tenants/other/policies/gold".into(), ..asked() });
    assert!(text.contains("own tenant"), "{text}");
}

#[test]
fn a_taken_name_is_refused() {
    let model = model();
    let mut txn = Txn::default();
    txn.put(Object::Group(new_group(&model, &shop(), &asked(), 1).unwrap()));
    let model = model.applied(txn, 2);
    assert!(matches!(new_group(&model, &shop(), &asked(), 1), Err(Problem::Exists { .. })));
}

#[test]
fn a_size_that_is_no_multiple_of_the_block_is_refused() {
    let bad = v1::Disk { size_bytes: 4097, ..disk("/a") };
    let text = DiskWanted::new("disk", "", &bad).unwrap_err().to_string();
    assert!(text.contains("disk.size_bytes") && text.contains("4097") && text.contains("multiple"), "{text}");
    let group = new_group(&model(), &shop(), &asked(), 1).unwrap();
    let wanted = DiskWanted::new("disk", "", &disk("/a")).unwrap();
    assert!(wanted.found("disk", &group, 0, Found { size: 1000, ..FOUND }, 1).is_err());
    assert!(wanted.found("disk", &group, 0, Found { size: 0, ..FOUND }, 1).is_err());
    let other = v1::Disk { size_bytes: 512, ..disk("/a") };
    let wanted = DiskWanted::new("disk", "", &other).unwrap();
    assert!(wanted.found("disk", &group, 0, FOUND, 1).unwrap_err().to_string().contains("1073741824"));
}

#[test]
fn paths_blocks_and_serials_are_checked() {
    for path in ["", "relative", "/a/../b", "/a\n", "/dir/", &format!("/{}", "x".repeat(MAX_PATH))] {
        assert!(DiskWanted::new("disk", "", &disk(path)).is_err(), "{path:?}");
    }
    for block in [1, 511, 513, 3000, 131072] {
        let bad = v1::Disk { block_bytes: block, ..disk("/a") };
        assert!(DiskWanted::new("disk", "", &bad).unwrap_err().to_string().contains("block_bytes"));
    }
    assert!(DiskWanted::new("disk", "", &v1::Disk { serial: "a b".into(), ..disk("/a") }).is_err());
    assert!(DiskWanted::new("disk", "", &v1::Disk { serial: "x".repeat(21), ..disk("/a") }).is_err());
    assert!(DiskWanted::new("disk", "", &v1::Disk { export_name: "a b".into(), ..disk("/a") }).is_err());
}

#[test]
fn what_is_not_said_gets_its_default() {
    let group = new_group(&model(), &shop(), &asked(), 1).unwrap();
    let made = DiskWanted::new("disk", "", &disk("/a")).unwrap().found("disk", &group, 3, FOUND, 1).unwrap();
    assert_eq!((made.size, made.block, made.physical_block, made.slot), (1 << 30, 512, 4096, 3));
    assert_eq!((made.serial.len(), made.export_name.as_str()), (20, "shop/data"));
}

#[test]
fn disks_that_clash_are_refused() {
    let model = model();
    let group = new_group(&model, &shop(), &asked(), 1).unwrap();
    let wanted = |id: &str, path: &str| DiskWanted::new("disk", id, &disk(path)).unwrap();
    let clash = |disks: &[DiskWanted]| check_disks(&model, &group, disks).unwrap_err();
    assert_eq!(check_disks(&model, &group, &[wanted("a", "/a"), wanted("b", "/b")]), Ok(()));
    assert!(
        matches!(clash(&[wanted("a", "/a"), wanted("a", "/b")]), Problem::Exists { field, .. } if field == "disk.name")
    );
    assert!(
        matches!(clash(&[wanted("a", "/a"), wanted("b", "/a")]), Problem::Exists { field, .. } if field == "disk.path")
    );

    let mut txn = Txn::default();
    txn.put(Object::Group(group.clone()));
    txn.put(Object::Disk(wanted("a", "/a").found("disk", &group, 0, FOUND, 1).unwrap()));
    let model = model.applied(txn, 2);
    let other = new_group(&model, &Name::new("default", Kind::Group, "crm"), &asked(), 1).unwrap();
    let text = check_disks(&model, &other, &[wanted("x", "/a")]).unwrap_err().to_string();
    assert!(text.contains("/a") && text.contains("groups/shop/disks/a"), "{text}");
}
