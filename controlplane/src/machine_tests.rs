use super::*;
use crate::failover::{Driven, fences};
use crate::model::Txn;
use crate::objects::new_uid;

fn model() -> (Model, Group) {
    let group = Group { uid: "g".into(), ..Group::sample("shop") };
    let disk = |slot: u16, id: &str| Disk {
        uid: format!("d{slot}"),
        group_uid: "g".into(),
        id: id.into(),
        slot,
        path: format!("/dev/{id}"),
        serial: format!("serial{slot}"),
        size: 1 << 30,
        block: 512,
        physical_block: 4096,
        export_name: format!("shop/{id}"),
        created_ns: 1,
        leaving: false,
        seed_path: String::new(),
    };
    let mut txn = Txn::default();
    txn.put(Object::Group(group.clone()));
    txn.put(Object::Disk(disk(0, "data")));
    txn.put(Object::Disk(disk(1, "log")));
    (Model::default().applied(txn, 1), group)
}

fn name(id: &str) -> Name {
    Name::new("default", Kind::Machine, id)
}

fn place(driver: v1::Driver) -> Option<v1::MachinePlace> {
    Some(v1::MachinePlace { driver: driver.into(), ..v1::MachinePlace::default() })
}

fn asked() -> v1::Machine {
    v1::Machine {
        group: "tenants/default/groups/shop".into(),
        source: place(v1::Driver::Hook),
        target: place(v1::Driver::Qemu),
        ..v1::Machine::default()
    }
}

fn wanted(model: &Model, id: &str, asked: &v1::Machine) -> Result<Machine, Problem> {
    Machine::wanted(model, &name(id), asked, None, 5)
}

#[test]
fn nothing_said_gives_the_defaults_and_reads_back() {
    let (model, group) = model();
    let machine = wanted(&model, "web", &asked()).unwrap();
    assert_eq!((machine.cpus, machine.memory, machine.stop_within_ms), (1, DEFAULT_MEMORY, DEFAULT_STOP_MS));
    assert_eq!((machine.source.profile.as_str(), machine.proxy_of(Role::Source, &group)), ("default", "src"));
    assert_eq!(machine.proxy_of(Role::Test("t"), &group), "dr");
    let shown = to_proto(&model, &machine);
    let again = Machine::wanted(&model, &name("web"), &shown, Some(&machine), 5).unwrap();
    assert_eq!(Machine { version: 1, ..again }, machine);
}

#[test]
fn what_is_not_allowed_is_named_with_what_is() {
    let (model, _) = model();
    type Change = fn(&mut v1::Machine);
    let cases: [(Change, &str, &str); 12] = [
        (|m| m.cpus = 2000, "machine.cpus", "1024"),
        (|m| m.memory_bytes = 1, "machine.memory_bytes", "16777216"),
        (|m| m.disks = vec!["swap".into()], "machine.disks[0]", "data, log"),
        (|m| m.disks = vec!["data".into(), "data".into()], "machine.disks[1]", "each disk once"),
        (
            |m| m.nics = vec![v1::Nic { mac: "01:00:00:00:00:00".into(), network: "lan".into(), ..v1::Nic::default() }],
            "nics[0].mac",
            "52:54",
        ),
        (|m| m.nics = vec![v1::Nic::default()], "machine.nics[0].network", "1 to 63"),
        (|m| m.target.as_mut().unwrap().machine = "../x".into(), "machine.target.machine", "first"),
        (|m| m.target.as_mut().unwrap().profile = "A b".into(), "machine.target.profile", "a-z"),
        (|m| m.target.as_mut().unwrap().driver = 99, "machine.target.driver", "libvirt"),
        (|m| m.stop_within_ms = Some(3_600_001), "machine.stop_within_ms", "3600000"),
        (|m| m.readiness = Some(v1::Readiness { kind: 2, value: "host".into() }), "readiness.value", "HOST:PORT"),
        (|m| m.readiness = Some(v1::Readiness { kind: 3, value: String::new() }), "readiness.value", "serial port"),
    ];
    for (change, field, allowed) in cases {
        let mut asked = asked();
        change(&mut asked);
        let text = wanted(&model, "web", &asked).unwrap_err().to_string();
        assert!(text.contains(field) && text.contains(allowed), "{text}");
    }
    let console = v1::Readiness { kind: v1::ReadinessKind::Console.into(), value: "login:".into() };
    let unseen = v1::Machine { readiness: Some(console), target: place(v1::Driver::Libvirt), ..asked() };
    assert!(wanted(&model, "web", &unseen).unwrap_err().to_string().contains("only the driver qemu"));
    let elsewhere = v1::Machine { group: "tenants/default/groups/none".into(), ..asked() };
    assert!(matches!(wanted(&model, "web", &elsewhere), Err(Problem::NotFound { .. })));
    let mut proxy = asked();
    proxy.target.as_mut().unwrap().proxy = "tenants/default/proxies/none".into();
    assert!(matches!(wanted(&model, "web", &proxy), Err(Problem::NotFound { .. })));
}

#[test]
fn a_disk_and_a_name_belong_to_one_machine() {
    let (model, _) = model();
    let db = wanted(&model, "db", &v1::Machine { disks: vec!["log".into()], ..asked() }).unwrap();
    let mut txn = Txn::default();
    txn.put(Object::Machine(db));
    let model = model.applied(txn, 2);
    let text = wanted(&model, "web", &asked()).unwrap_err().to_string();
    assert!(text.contains("\"log\" is taken") && text.contains("machines/db"), "{text}");
    let mut web = v1::Machine { disks: vec!["data".into()], ..asked() };
    assert!(wanted(&model, "web", &web).is_ok());
    web.target.as_mut().unwrap().machine = "db".into();
    assert!(wanted(&model, "web", &web).unwrap_err().to_string().contains("machine.target.machine \"db\" is taken"));
}

#[test]
fn instances_are_told_apart_and_disks_come_in_the_machines_order() {
    let (model, group) = model();
    let machine = wanted(&model, "web", &v1::Machine { disks: vec!["log".into(), "data".into()], ..asked() }).unwrap();
    let called = |tell: Tell| match tell {
        Tell::StopInstance(stop) => stop.machine.unwrap().instance,
        other => panic!("{other:?}"),
    };
    assert_eq!(called(machine.stop(Role::Replica, 0)), "web");
    assert_eq!(called(machine.stop(Role::Test("t1"), 0)), "web.t1");
    let acme = Machine { tenant: "acme".into(), ..machine.clone() };
    assert_eq!(called(acme.stop(Role::Replica, 0)), "acme.web");
    let disks: Vec<MachineDisk> = machine.disks_in(&model, &group).into_iter().map(Into::into).collect();
    let export = |disk: &str, uid: &str| ExportRecord {
        disk: disk.into(),
        disk_uid: uid.into(),
        name: format!("v/{disk}"),
        uris: vec![format!("nbd://h/{disk}")],
        size: 7,
    };
    let shown = view_disks(&disks, &[export("data", "d0"), export("log", "d1")]);
    let shown: Vec<_> = shown.iter().map(|d| (d.disk.as_str(), d.export_name.as_str(), d.serial.as_str())).collect();
    assert_eq!(shown, [("log", "v/log", "serial1"), ("data", "v/data", "serial0")]);
}

#[test]
fn machines_confirm_that_a_source_is_off_only_if_all_its_disks_are_theirs() {
    let (model, group) = model();
    let driven = |asked: &v1::Machine| {
        let machine = wanted(&model, &new_uid(), asked).unwrap();
        let disks = machine.disks_in(&model, &group).into_iter().map(Into::into).collect();
        Driven { machine, disks, was_on: None }
    };
    let all = ["d0".to_owned(), "d1".to_owned()];
    assert!(fences(&[driven(&asked())], &all));
    assert!(!fences(&[driven(&v1::Machine { disks: vec!["data".into()], ..asked() })], &all), "nobody speaks for log");
    assert!(!fences(&[driven(&v1::Machine { source: None, ..asked() })], &all), "nobody can be asked");
    assert!(!fences(&[], &[]));
}
