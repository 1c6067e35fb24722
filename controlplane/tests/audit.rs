//! The audit log over the API: who did what is in it, secrets are not, and what is done with it is found out.

mod world;

use afterimage_controlplane::client;
use afterimage_wire::v1::audit_client::AuditClient;
use afterimage_wire::v1::command::Command as Tell;
use afterimage_wire::v1::policies_client::PoliciesClient;
use afterimage_wire::v1::*;
use tonic::Code;
use tonic::transport::Channel;
use world::*;

fn audit(world: &World) -> AuditClient<Channel> {
    AuditClient::new(world.channel.clone())
}

async fn records(world: &World, filter: &str) -> Vec<AuditRecord> {
    let request = ListAuditRecordsRequest { parent: TENANT.into(), filter: filter.into(), ..Default::default() };
    audit(world).list_audit_records(request).await.unwrap().into_inner().records
}

async fn verified(world: &World) -> VerifyAuditResponse {
    audit(world).verify_audit(VerifyAuditRequest { parent: TENANT.into() }).await.unwrap().into_inner()
}

fn policy(id: &str, request_id: &str) -> CreatePolicyRequest {
    let policy = Some(Policy { description: "words-of-a-person".into(), ..Policy::default() });
    CreatePolicyRequest {
        parent: TENANT.into(),
        policy_id: id.into(),
        policy,
        request_id: request_id.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn every_change_is_recorded_with_who_did_it() {
    let mut world = World::new().await;
    let token = world.token(Role::Operator, "anna").await;
    let anna = client::connect(&client::join(&token, None).await.unwrap()).await.unwrap();
    PoliciesClient::new(anna.clone()).create_policy(policy("a", "r-1")).await.unwrap();
    // Asked again, or only tried, nothing is done and nothing recorded; nor of what was refused for its content.
    PoliciesClient::new(anna.clone()).create_policy(policy("a", "r-1")).await.unwrap();
    let trial = CreatePolicyRequest { validate_only: true, ..policy("b", "") };
    PoliciesClient::new(anna.clone()).create_policy(trial).await.unwrap();
    assert_eq!(code(PoliciesClient::new(anna.clone()).create_policy(policy("a", "")).await), Code::AlreadyExists);

    let made = records(&world, "objects:\"put policies/default/a\"").await;
    assert_eq!(made.len(), 1);
    let made = &made[0];
    assert_eq!(
        (made.actor.as_str(), made.method.as_str(), made.request_id.as_str(), made.outcome.as_str()),
        ("operator/anna", "Policies/CreatePolicy", "r-1", "done")
    );
    let joined = records(&world, "method = \"Enrolment/Join\"").await;
    assert!(joined[0].objects[0].starts_with("delete tokens/"), "{joined:?}");

    // What is denied for its role is recorded, too.
    let denied = AuditClient::new(anna).verify_audit(VerifyAuditRequest { parent: TENANT.into() }).await;
    assert_eq!(code(denied), Code::PermissionDenied);
    let mut found = Vec::new();
    for _ in 0..100 {
        found = records(&world, "outcome:\"denied*\"").await;
        if !found.is_empty() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!((found[0].actor.as_str(), found[0].method.as_str()), ("operator/anna", "Audit/VerifyAudit"));

    let before = verified(&world).await;
    assert!(before.faults.is_empty(), "{before:?}");
    world.restart().await;
    let after = verified(&world).await;
    assert!(after.faults.is_empty() && after.last > before.last, "{after:?}");

    // No token, key or text of an object is in it.
    let files = std::fs::read_dir(world.folder.path().join("coordinator/audit")).unwrap();
    let bytes: Vec<u8> = files.flat_map(|f| std::fs::read(f.unwrap().path()).unwrap()).collect();
    let text = String::from_utf8(bytes).unwrap();
    assert!(!text.contains(&token[10..60]) && !text.contains("words-of-a-person") && !text.contains("PRIVATE"));
}

#[tokio::test]
async fn a_log_that_was_cut_or_altered_is_found_out() {
    let mut world = World::new().await;
    for id in ["a", "b", "c"] {
        world.policies().create_policy(policy(id, "")).await.unwrap();
    }
    let dir = world.folder.path().join("coordinator/audit");
    let path = std::fs::read_dir(&dir).unwrap().next().unwrap().unwrap().path();
    let whole = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = whole.lines().collect();

    let cut: String = lines[..lines.len() - 1].iter().map(|l| format!("{l}\n")).collect();
    std::fs::write(&path, cut).unwrap();
    assert!(verified(&world).await.faults[0].contains("missing"));
    std::fs::write(&path, whole.replacen("policies/default/b", "policies/default/x", 1)).unwrap();
    assert!(verified(&world).await.faults[0].contains("altered"));
    // Cut while nobody ran: the next life tells it, too, and goes on recording.
    world.restart_after(|| std::fs::write(&path, lines[..2].join("\n") + "\n").unwrap()).await;
    world.policies().create_policy(policy("d", "")).await.unwrap();
    let found = verified(&world).await;
    assert!(found.faults.iter().any(|f| f.contains("are missing")), "{found:?}");
}

#[tokio::test]
async fn two_requests_for_a_cut_with_one_id_make_one() {
    let world = World::new().await;
    let (source, _target) = world.shop().await;
    let cut = || CreateCutRequest {
        parent: SHOP.into(),
        label: "before the release".into(),
        request_id: "one".into(),
        ..Default::default()
    };
    let (mut a, mut b, mut c) = (world.points(), world.points(), world.points());
    let (a, b, c) = tokio::join!(a.create_cut(cut()), b.create_cut(cut()), c.create_cut(cut()));
    let seqs: Vec<u64> = [a, b, c].into_iter().map(|p| p.unwrap().into_inner().seq).collect();
    assert!(seqs[0] == seqs[1] && seqs[1] == seqs[2], "{seqs:?}");
    let told = source.told().iter().filter(|t| matches!(t, Tell::LabelCut(_))).count();
    assert_eq!(told, 1);
}
