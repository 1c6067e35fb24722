//! What is read out of reports about a failback.

use super::*;
use crate::group::tests::{first_disk, policy, proxy};
use crate::live::ProxyLive;
use crate::model::Txn;
use crate::names::{Kind, Name};
use crate::objects::{Object, Reverse};
use crate::policy::Wanted;

fn model() -> (Model, Group) {
    let mut txn = Txn::default();
    for (id, address) in [("src", "src:1"), ("dr", "dr:1")] {
        txn.put(Object::Proxy(proxy(id, address)));
    }
    txn.put(Object::Policy(policy("gold", &Wanted::default())));
    let model = Model::default().applied(txn, 7);
    let asked = v1::Group {
        policy: "tenants/default/policies/gold".into(),
        source: "tenants/default/proxies/src".into(),
        target: "tenants/default/proxies/dr".into(),
        ..v1::Group::default()
    };
    let name = Name::new("default", Kind::Group, "shop");
    let mut group = crate::group::new_group(&model, &name, &asked, 1).unwrap();
    let (stream_uid, view) = ("back".to_owned(), "failover".to_owned());
    group.reverse = Some(Reverse { stream_uid, view, generation: 1, writer_generation: 1, hold: false });
    let mut txn = Txn::default();
    txn.put(Object::Disk(first_disk(&group)));
    txn.put(Object::Group(group.clone()));
    (model.applied(txn, 8), group)
}

fn source(state: &str, model: &Model, group: &Group) -> v1::SourceGroupReport {
    let disk_uid = model.disks_of(group).next().unwrap().uid.clone();
    let disk = v1::SourceDiskReport { disk_uid, state: state.into(), ..Default::default() };
    v1::SourceGroupReport { link: v1::LinkState::Up.into(), disks: vec![disk], ..Default::default() }
}

fn target(seq: u64, model: &Model, group: &Group) -> v1::TargetStreamReport {
    let newest = v1::Point { seq, disks: model.disks_of(group).map(|d| d.uid.clone()).collect(), ..Default::default() };
    let points = v1::PointSummary { newest: Some(newest), ..Default::default() };
    v1::TargetStreamReport { points: Some(points), ..Default::default() }
}

#[test]
fn it_is_ready_once_a_complete_point_is_held_and_nothing_is_synchronised() {
    let (model, group) = model();
    let mut live = Live::default();
    let missing = |live: &Live, after| missing(&model, live, &group, Way::Back, after);
    assert!(missing(&live, 0).unwrap().contains("\"dr\" has not reported"));
    let mut stream = StreamLive { source: Some((1, source("serving", &model, &group))), ..Default::default() };
    live.streams.insert("back".into(), StreamLive { source: stream.source.clone(), ..Default::default() });
    assert!(missing(&live, 0).unwrap().contains("\"src\" holds no complete point"));
    stream.target = Some((1, target(9, &model, &group)));
    live.streams.insert("back".into(), stream);
    assert_eq!(missing(&live, 0), None);
    assert_eq!(missing(&live, 8), None);
    assert!(missing(&live, 9).is_some(), "an older point says nothing of what is written since");
    let report = &mut live.streams.get_mut("back").unwrap().source.as_mut().unwrap().1;
    report.sync = Some(v1::SyncProgress { done_bytes: 5, total_bytes: 9, left_ms: Some(1_500), ..Default::default() });
    assert_eq!(missing(&live, 0).unwrap(), "synchronising, 5 of 9 bytes, about 2 s left");
    let report = &mut live.streams.get_mut("back").unwrap().source.as_mut().unwrap().1;
    (report.link, report.link_detail) = (v1::LinkState::Down.into(), "refused".into());
    assert!(missing(&live, 0).unwrap().ends_with("\"src\": refused"));
}

#[test]
fn a_source_serves_or_holds_as_of_a_report_that_knows_what_it_was_told() {
    let (model, group) = model();
    let uid = model.source_of(&group).unwrap().uid.clone();
    let mut live = Live::default();
    assert!(started(&model, &live, &group, 5).is_err() && held(&model, &live, &group, 5).is_err());
    let proxy = |at, observed_version| ProxyLive { last_heard_ns: Some(at), observed_version, ..Default::default() };
    live.proxies.insert(uid.clone(), proxy(10, 4));
    assert!(held(&model, &live, &group, 5).unwrap_err().contains("what it was told"));
    // Not run at all: held, and not started.
    live.proxies.insert(uid.clone(), proxy(10, 5));
    assert_eq!(held(&model, &live, &group, 5), Ok(()));
    assert!(started(&model, &live, &group, 5).is_err());
    // An older report than the newest is of a group that it runs no more.
    let mut stream = StreamLive { source: Some((9, source("serving", &model, &group))), ..Default::default() };
    live.streams.insert(group.uid.clone(), StreamLive { source: stream.source.clone(), ..Default::default() });
    assert!(started(&model, &live, &group, 5).is_err());
    stream.source = Some((10, source("serving", &model, &group)));
    live.streams.insert(group.uid.clone(), stream);
    assert_eq!(started(&model, &live, &group, 5), Ok(()));
    assert!(held(&model, &live, &group, 5).is_err());
    let report = &mut live.streams.get_mut(&group.uid).unwrap().source.as_mut().unwrap().1;
    *report = v1::SourceGroupReport { held: true, ..source("held", &model, &group) };
    assert_eq!(held(&model, &live, &group, 5), Ok(()));
    assert!(started(&model, &live, &group, 5).unwrap_err().contains("holds all I/O"));
    *report_of(&mut live, &group) = source("failed: gone", &model, &group);
    assert!(started(&model, &live, &group, 5).unwrap_err().contains("failed: gone"));
    let problem = v1::Problem { stream_uid: group.uid.clone(), message: "no such file".into(), ..Default::default() };
    live.proxies.insert(uid, ProxyLive { problems: vec![problem], ..proxy(10, 5) });
    assert_eq!(started(&model, &live, &group, 5).unwrap_err(), "no such file");
}

fn report_of<'a>(live: &'a mut Live, group: &Group) -> &'a mut v1::SourceGroupReport {
    &mut live.streams.get_mut(&group.uid).unwrap().source.as_mut().unwrap().1
}

#[test]
fn a_reverse_stream_has_begun_once_both_report_it_or_it_is_said_why_not() {
    let (model, group) = model();
    let mut live = Live::default();
    assert!(begun(&model, &live, &group).unwrap_err().starts_with("\"dr\""));
    let mut stream = StreamLive { source: Some((1, source("serving", &model, &group))), ..Default::default() };
    live.streams.insert("back".into(), StreamLive { source: stream.source.clone(), ..Default::default() });
    let problem = v1::Problem { stream_uid: "back".into(), message: "no room".into(), ..Default::default() };
    let uid = model.source_of(&group).unwrap().uid.clone();
    live.proxies.insert(uid, ProxyLive { problems: vec![problem], ..Default::default() });
    assert_eq!(begun(&model, &live, &group).unwrap_err(), "\"src\": no room");
    stream.target = Some((1, target(9, &model, &group)));
    live.streams.insert("back".into(), stream);
    assert_eq!(begun(&model, &live, &group), Ok(()));
    assert!(begun(&model, &live, &Group { reverse: None, ..group }).is_err());
}
