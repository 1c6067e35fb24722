//! The built command against a real coordinator: what it shows, its JSON, its exit codes. Disks are not needed: the
//! proxies here only say what proxies say.

mod bed;
mod proxies;
mod refusals;
mod role;

use bed::{Bed, Said, binary, run};
use serde_json::Value;

fn names(document: &Value, list: &str, field: &str) -> Vec<String> {
    let items = document[list].as_array().unwrap_or_else(|| panic!("no {list} in {document}"));
    items.iter().map(|item| item[field].as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
fn a_policy_is_created_changed_listed_and_deleted() {
    let bed = Bed::new();
    let made = bed.run("policy create gold --rpo 500ms --retention 2h --json").document();
    assert_eq!(
        (&made["policy"], &made["rpo_target_ms"], &made["retention_s"]),
        (&"gold".into(), &500.0.into(), &7200.into())
    );
    let changed = bed.run("policy update gold --retention 3h --json").document();
    assert_eq!(changed["retention_s"], 10_800);
    assert_eq!(changed["rpo_target_ms"], 500.0, "what was not given stays");
    assert!(bed.run("policy list").text().contains("3 h"));
    assert_eq!(names(&bed.run("policy list --json").document(), "policies", "policy"), ["gold"]);
    bed.ok("policy delete gold");
    assert_eq!(bed.run("policy show gold").code, 5);
}

#[test]
fn a_dry_run_changes_nothing() {
    let bed = Bed::new();
    bed.ok("policy create gold --dry-run");
    assert_eq!(names(&bed.run("policy list --json").document(), "policies", "policy"), [""; 0]);
}

#[test]
fn a_group_is_created_and_shown_with_its_disks() {
    let bed = Bed::protected();
    let group = bed.run("group show shop --json").document();
    assert_eq!(names(&group, "disks", "disk"), ["data", "logs"]);
    assert_eq!(group["disks"][0]["size_bytes"], proxies::DISK_BYTES);
    assert_eq!((&group["source"], &group["target"], &group["policy"]), (&"src".into(), &"dr".into(), &"gold".into()));
    let shown = bed.run("group show shop").text();
    assert!(shown.contains("/dev/a") && shown.contains("1 GiB"), "{shown}");
    assert!(bed.run("group list").text().contains("protected"));
    assert_eq!(names(&bed.run("disk list --json").document(), "disks", "group"), ["shop", "shop"]);
}

#[test]
fn status_shows_rpo_in_milliseconds_and_what_is_held() {
    let bed = Bed::protected();
    let status = bed.run("status --json").document();
    assert!(status["groups"][0]["rpo"]["now_ms"].as_f64().is_some_and(|ms| ms >= 4.2));
    assert_eq!(status["groups"][0]["points"]["count"], proxies::NEWEST);
    assert_eq!(names(&status, "proxies", "proxy").len(), 2);
    let table = bed.run("status").text();
    assert!(table.contains("RPO NOW") && table.contains(" ms") && table.contains("MiB/s"), "{table}");
    let one = bed.run("status shop").text();
    assert!(one.contains("RPO target") && one.contains("nbd+unix:///"), "{one}");
}

#[test]
fn points_are_listed_by_number_and_by_time() {
    let bed = Bed::protected();
    let newest = bed.run("point list shop --limit 3 --json").document();
    let cuts: Vec<u64> = newest["points"].as_array().unwrap().iter().map(|p| p["cut"].as_u64().unwrap()).collect();
    assert_eq!(cuts, [98, 99, 100]);
    assert_eq!(newest["matched"], 100);
    // Writes 0 to 1000 lie in the first second.
    let first = bed
        .run("point list shop --before 2023-11-14T22:13:21Z --after 2023-11-14T22:13:20.5Z --limit 0 --json")
        .document();
    let seqs: Vec<u64> = first["points"].as_array().unwrap().iter().map(|p| p["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs, [500, 600, 700, 800, 900, 1000]);
    let writes = bed.run("point list shop --writes --limit 5 --json").document();
    assert_eq!(writes["points"][0]["seq"], proxies::NEWEST - 4);
    assert!(bed.run("point list shop").text().contains("the newest 20 of 100 cuts"));
}

#[test]
fn a_point_is_found_in_every_way_to_name_it() {
    let bed = Bed::protected();
    for (choice, seq) in [
        ("", 10_000),
        ("latest", 10_000),
        ("cut:7", 700),
        ("--cut 7", 700),
        ("seq:1234", 1234),
        ("--seq 1234", 1234),
        ("--at 2023-11-14T22:13:21Z", 1000),
        ("time:2023-11-14T22:13:21.5Z", 1500),
    ] {
        assert_eq!(bed.run(&format!("point show shop {choice} --json")).document()["seq"], seq, "{choice}");
    }
    assert_eq!(bed.run("point cut shop --label before-upgrade --json").document()["label"], "before-upgrade");
}

#[test]
fn a_view_is_opened_listed_and_closed() {
    let bed = Bed::protected();
    let view = bed.run("view open shop check --to cut:50 --json").document();
    assert_eq!(view["point"]["seq"], 5000);
    assert_eq!(names(&view, "exports", "disk"), ["data", "logs"]);
    assert!(view["exports"][0]["uris"][0].as_str().unwrap().starts_with("nbd+unix://"));
    assert!(bed.run("view list").text().contains("check"));
    assert!(bed.run("view show shop check").text().contains("nbd+unix://"));
    assert_eq!(bed.run("view close shop check --json").document()["closed"]["view"], "check");
    assert_eq!(bed.run("view list --json").document()["views"], Value::Array(vec![]));
}

#[test]
fn what_was_written_to_a_view_is_not_thrown_away_unasked() {
    let bed = Bed::protected();
    bed.ok("view open shop test --writable --disk data");
    let refused = bed.run("view close shop test");
    assert_eq!(refused.code, 3);
    assert!(refused.err.contains("thrown away") && refused.err.contains("--yes"), "{}", refused.err);
    bed.ok("view close shop test --yes");
}

#[test]
fn a_failover_says_first_what_it_leaves_behind_and_does_nothing_unasked() {
    let bed = Bed::protected();
    let refused = bed.run("failover start shop --to seq:9000");
    assert_eq!(refused.code, 3);
    assert!(refused.err.contains("1_000 later writes"), "{}", refused.err);
    assert_eq!(bed.run("failover list --json").document()["failovers"], Value::Array(vec![]));
}

#[test]
fn a_failover_runs_to_its_end_and_says_where_to_start_from() {
    let bed = Bed::protected();
    let checked = bed.run("failover start shop --to latest --dry-run --json").document();
    assert_eq!((&checked["dry_run"], &checked["state"]), (&true.into(), &"done".into()));
    assert_eq!(bed.run("group show shop --json").document()["phase"], "protected");

    let done = bed.run("failover start shop --to cut:90 --yes --json").document();
    assert_eq!((&done["state"], &done["result"]["point"]["seq"]), (&"done".into(), &9000.into()));
    assert_eq!(done["result"]["fence"], "confirmed");
    assert_eq!(names(&done["result"]["view"], "exports", "disk"), ["data", "logs"]);
    assert_eq!(bed.run("group show shop --json").document()["phase"], "failed-over");

    let operation = done["operation"].as_str().unwrap();
    assert!(bed.run(&format!("failover show {operation}")).text().contains("open-view"));
    assert!(bed.run(&format!("failover wait {operation}")).text().contains("start its machine from"));
    assert_eq!(names(&bed.run("failover list shop --json").document(), "failovers", "operation"), [operation]);
}

#[test]
fn a_failback_says_how_far_it_is_and_brings_the_group_back() {
    let bed = Bed::protected();
    let refused = bed.run("failback start shop --json");
    assert_eq!(refused.code, 3);
    assert!(refused.error()["message"].as_str().unwrap().contains("not failed over"), "{}", refused.err);
    bed.ok("failover start shop --to latest --yes");
    let checked = bed.run("failback start shop --dry-run --json").document();
    assert_eq!((&checked["verb"], &checked["dry_run"]), (&"failback".into(), &true.into()));
    assert!(bed.run("failback start shop").text().contains("protected back"));
    let state = bed.run("failback status shop --json").document();
    assert_eq!((&state["phase"], &state["reverse"]["ready"]), (&"failing-back".into(), &true.into()));
    assert!(bed.run("failback status shop").text().contains("ready to switch"));
    assert!(bed.run("status shop").text().contains("ready to switch"));
    assert!(bed.run("failback cancel shop").text().contains("stays failed over"));
    bed.ok("failback start shop");
    // What it overwrites is said first.
    let unasked = bed.run("failback switch shop");
    assert_eq!(unasked.code, 3);
    assert!(unasked.err.contains("overwritten") && unasked.err.contains("--yes"), "{}", unasked.err);
    let switched = bed.run("failback switch shop --yes --json").document();
    assert_eq!((&switched["state"], &switched["result"]["generation"]), (&"done".into(), &3.into()));
    assert_eq!((&switched["result"]["point"], &switched["result"]["branch"]["kept"]), (&Value::Null, &true.into()));
    assert_eq!(bed.run("failback status shop --json").document()["phase"], "failed-back");
    assert!(bed.run("failback status shop").text().contains("can be undone"));
    assert_eq!(bed.run("failback commit shop --yes").code, 3, "nothing that its source wrote since is held");
    let wrong = bed.run("failback undo shop --unconfirmed shpo --yes");
    assert_eq!(wrong.code, 2, "{}", wrong.err);
    let undone = bed.run("failback undo shop --yes --json").document();
    assert_eq!(names(&undone["result"]["view"], "exports", "disk"), ["data", "logs"]);
    assert_eq!(bed.run("group show shop --json").document()["phase"], "failed-over");
}

#[test]
fn watch_writes_a_line_of_json_for_each_state() {
    let bed = Bed::protected();
    let said = bed.run("watch shop --interval 100ms --for 600ms --json");
    assert_eq!(said.code, 0, "{}", said.err);
    let lines: Vec<Value> = said.out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(lines.iter().filter(|line| line["type"] == "status").count() >= 2, "{}", said.out);
    let plain = bed.run("watch shop --interval 100ms --for 300ms");
    assert!(plain.out.contains("shop  protected  streaming  rpo "), "{}", plain.out);
    assert!(!plain.out.contains('\u{1b}'), "no picture where there is no terminal");
}

#[test]
fn events_tell_what_has_happened() {
    let bed = Bed::protected();
    let events = bed.run("events --json").document();
    assert!(!events["events"].as_array().unwrap().is_empty());
    assert_eq!(bed.run("events --limit 1 --json").document()["events"].as_array().unwrap().len(), 1);
}

#[test]
fn somebody_joins_by_a_token_and_may_do_what_the_role_allows() {
    let bed = Bed::new();
    let token = bed.run("token create vera --role viewer --ttl 5m").text();
    let file = bed.dir.path().join("vera.json");
    let joined = |token: &str| -> Said { run(binary().args(["join", token.trim(), "--identity"]).arg(&file)) };
    assert!(joined(&token).text().contains("viewer/vera"));
    assert_eq!(bed.run_as(&file, "policy list").code, 0);
    let refused = bed.run_as(&file, "policy create gold --json");
    assert_eq!((refused.code, &refused.error()["kind"]), (3, &"refused".into()));
    assert_eq!(joined(&token).code, 6, "an identity is not overwritten unasked");
}

#[test]
fn a_group_is_deleted_only_after_its_loss_was_said() {
    let bed = Bed::protected();
    let refused = bed.run("group delete shop --delete-points");
    assert_eq!(refused.code, 3);
    assert!(refused.err.contains("10_000 restore points"), "{}", refused.err);
    bed.ok("group delete shop --delete-points --yes");
    bed.until("group list --json", |doc| doc["groups"].as_array().is_some_and(Vec::is_empty));
}

#[test]
fn the_shell_sees_its_own_kind_of_end_when_the_reader_goes() {
    let mut command = binary();
    command.args(["version"]).stdout(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
