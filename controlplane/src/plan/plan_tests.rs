use super::*;
use crate::model::Txn;
use crate::objects::{Group, Proxy};

fn model() -> Model {
    let mut txn = Txn::default();
    for id in ["db", "app", "web"] {
        txn.put(Object::Group(Group::sample(id)));
    }
    let proxy = Proxy {
        uid: "p".into(),
        tenant: "default".into(),
        id: "dr".into(),
        version: 1,
        created_ns: 1,
        pin: "aa".into(),
        previous_pin: None,
        expire_time_ns: 9,
        data_address: String::new(),
        nbd_addresses: Vec::new(),
        capabilities: Vec::new(),
        boot_id: String::new(),
        software_version: String::new(),
        renew_time_ns: 0,
        site: String::new(),
    };
    txn.put(Object::Proxy(proxy));
    Model::default().applied(txn, 1)
}

fn step(group: &str, after: &[&str]) -> v1::PlanStep {
    let after = after.iter().map(|id| (*id).to_owned()).collect();
    v1::PlanStep { group: format!("tenants/default/groups/{group}"), after, ..v1::PlanStep::default() }
}

fn wanted(steps: Vec<v1::PlanStep>) -> Result<Plan, Problem> {
    let asked = v1::Plan { steps, ..v1::Plan::default() };
    Plan::wanted(&model(), &Name::new("default", Kind::Plan, "site"), &asked, None, 1)
}

#[test]
fn what_is_left_out_has_its_default_and_reads_back_as_it_was_made() {
    let script = |script: &str| v1::PlanScript { script: script.into(), ..v1::PlanScript::default() };
    let proxy = "tenants/default/proxies/dr".to_owned();
    let check = v1::PlanCheck { what: Some(v1::plan_check::What::Tcp("10.0.0.7:80".into())), proxy: proxy.clone() };
    let app = v1::PlanStep {
        id: "logic".into(),
        check: Some(check),
        before: vec![script("dns")],
        then: vec![v1::PlanScript { proxy, verbs: vec![v1::PlanVerb::Undo.into()], ..script("tell") }],
        ..step("app", &["db"])
    };
    let plan = wanted(vec![step("db", &[]), app, step("web", &["db", "logic"])]).unwrap();
    assert_eq!((plan.parallel, plan.steps[0].ready_within_ms, plan.steps[1].id.as_str()), (4, 300_000, "logic"));
    let named = |verb, after| plan.steps[1].scripts(verb, after).iter().map(|s| s.name.as_str()).collect::<Vec<_>>();
    assert_eq!((named(PlanVerb::Run, false), named(PlanVerb::Run, true)), (vec!["dns"], vec![]));
    assert_eq!((named(PlanVerb::Undo, false), named(PlanVerb::Undo, true)), (vec![], vec!["tell"]));
    assert!(plan.names_proxy("dr") && !plan.names_proxy("src"));
    let again = Plan::wanted(&model(), &plan.name(), &to_proto(&model(), &plan), Some(&plan), 2).unwrap();
    assert_eq!(again, Plan { version: 2, updated_ns: 2, ..plan });
}

#[test]
fn what_makes_no_sense_is_refused_by_its_field() {
    let tcp = |at: &str| v1::PlanStep {
        check: Some(v1::PlanCheck { what: Some(v1::plan_check::What::Tcp(at.into())), proxy: String::new() }),
        ..step("db", &[])
    };
    let script = |script: &str, proxy: &str| v1::PlanStep {
        before: vec![v1::PlanScript { script: script.into(), proxy: proxy.into(), verbs: vec![] }],
        ..step("db", &[])
    };
    for (steps, field) in [
        (vec![], "plan.steps"),
        (vec![step("db", &["db"])], "plan.steps[0].after"),
        (vec![step("db", &["web"]), step("web", &["db"])], "plan.steps[0].after"),
        (vec![step("db", &[]), step("web", &["db", "db"])], "plan.steps[1].after"),
        (vec![step("db", &[]), step("db", &[])], "plan.steps[1].id"),
        (vec![step("db", &[]), v1::PlanStep { id: "x".into(), ..step("db", &[]) }], "plan.steps[1].group"),
        (vec![v1::PlanStep { id: "X".into(), ..step("db", &[]) }], "plan.steps[0].id"),
        (vec![v1::PlanStep { delay_ms: 86_400_001, ..step("db", &[]) }], "plan.steps[0].delay_ms"),
        (vec![v1::PlanStep { ready_within_ms: Some(0), ..step("db", &[]) }], "plan.steps[0].ready_within_ms"),
        (vec![v1::PlanStep { retries: 11, ..step("db", &[]) }], "plan.steps[0].retries"),
        (vec![tcp("10.0.0.7")], "plan.steps[0].check.tcp"),
        (vec![tcp("h:0")], "plan.steps[0].check.tcp"),
        (vec![script("a b", "")], "plan.steps[0].before[0].script"),
        (vec![script("a", "dr")], "plan.steps[0].before[0].proxy"),
    ] {
        match wanted(steps) {
            Err(Problem::Invalid { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    }
    for steps in [vec![step("gone", &[])], vec![script("a", "tenants/default/proxies/gone")]] {
        assert!(matches!(wanted(steps), Err(Problem::NotFound { .. })));
    }
}
