//! `afterimage audit`: who has changed what, and whether the log of it is whole.

use std::path::PathBuf;

use afterimage_controlplane::audit;
use afterimage_wire::v1;
use clap::Subcommand;
use serde_json::{Value, json};

use super::failure::{Failure, Kind};
use super::output::{Output, fields, table, text};
use super::session::{Recent, Session, every};
use super::values::{json_time, show_time};

/// Verbs of `afterimage audit`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// List the records: one for each change, and for each call that was denied.
    #[command(after_help = "Examples:\n  \
        afterimage audit list --limit 20\n  \
        afterimage audit list --filter 'actor = \"operator/anna\" AND objects:\"put policies/*\"'\n  \
        afterimage audit list --json --limit 0 > audit.json")]
    List(Recent),
    /// Read the whole log: was something altered, left out or cut off? Exit code 1 if so.
    #[command(after_help = "Examples:\n  \
        afterimage audit verify\n  \
        afterimage audit verify --expect 4711:9f86d081…            what an earlier verification said\n  \
        afterimage audit verify --dir c1/audit --dir c2/audit    copies, without a coordinator")]
    Verify {
        /// This record must have this hash, as an earlier verification said.
        #[arg(long, value_name = "NUMBER:HASH", value_parser = expected)]
        expect: Option<(u64, String)>,
        /// Verify files in this folder instead; the logs of coordinators that share a store together.
        #[arg(long, value_name = "FOLDER")]
        dir: Vec<PathBuf>,
    },
}

fn expected(text: &str) -> Result<(u64, String), String> {
    let (number, hash) = text.split_once(':').ok_or("wanted is NUMBER:HASH")?;
    let number = number.parse().map_err(|_| format!("\"{number}\" is no number of a record"))?;
    if hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err("a hash has 64 hexadecimal digits".to_owned());
    }
    Ok((number, hash.to_ascii_lowercase()))
}

/// Verifies copies of logs: needs no coordinator.
pub fn copies(verb: &Verb, out: Output) -> Option<Result<(), Failure>> {
    let Verb::Verify { expect, dir } = verb else { return None };
    if dir.is_empty() {
        return None;
    }
    let unreadable = |error: std::io::Error| Failure::new(Kind::Failed, OBJECT, format!("cannot be read: {error}"));
    let look = || {
        let verdict = audit::verify(dir, None).map_err(unreadable)?;
        let mut hash_there = None;
        if let Some((number, _)) = expect {
            let next = dir.iter().flat_map(|d| audit::read(d, number + 1, 1, |_| true).ok()?.pop());
            let next = next.into_iter().find(|r| r.seq == number + 1).map(|r| r.prev);
            hash_there = if *number == verdict.last { Some(verdict.hash.clone()) } else { next };
        }
        let answer = v1::VerifyAuditResponse {
            records: verdict.records,
            first: verdict.first,
            last: verdict.last,
            hash: verdict.hash,
            faults: verdict.faults.iter().map(ToString::to_string).collect(),
        };
        told(answer, expect.as_ref(), hash_there, out)
    };
    Some(look())
}

const OBJECT: &str = "audit log";

/// Runs a verb.
pub async fn run(verb: Verb, session: &Session) -> Result<(), Failure> {
    match verb {
        Verb::List(Recent { from, limit, which }) => {
            let request = v1::ListAuditRecordsRequest {
                parent: session.tenant(),
                from_number: from,
                page_size: 1000,
                filter: which.filter,
                ..Default::default()
            };
            let mut all: Vec<v1::AuditRecord> = every!(session, OBJECT, audit.list_audit_records(request).records);
            if limit > 0 {
                all.drain(..all.len().saturating_sub(limit as usize));
            }
            let documents: Vec<Value> = all.iter().map(document).collect();
            session.out.show(&json!({"records": documents}), || listed(&all));
            Ok(())
        }
        Verb::Verify { expect, .. } => {
            let request = v1::VerifyAuditRequest { parent: session.tenant() };
            let answer = session.ask(OBJECT, session.audit().verify_audit(request)).await?;
            let mut there = None;
            if let Some((number, _)) = &expect {
                there =
                    if *number == answer.last { Some(answer.hash.clone()) } else { hash_of(session, *number).await? };
            }
            told(answer, expect.as_ref(), there, session.out)
        }
    }
}

/// The hash of a record, as the next one says.
async fn hash_of(session: &Session, number: u64) -> Result<Option<String>, Failure> {
    let request = v1::ListAuditRecordsRequest {
        parent: session.tenant(),
        from_number: number + 1,
        page_size: 1,
        ..Default::default()
    };
    let page = session.ask(OBJECT, session.audit().list_audit_records(request)).await?;
    Ok(page.records.into_iter().find(|r| r.number == number + 1).map(|r| r.previous_hash))
}

fn told(
    mut answer: v1::VerifyAuditResponse,
    expect: Option<&(u64, String)>,
    there: Option<String>,
    out: Output,
) -> Result<(), Failure> {
    if let Some((number, hash)) = expect
        && there.as_ref() != Some(hash)
    {
        answer.faults.push(format!("record {number} is not the one that was expected"));
    }
    let whole = answer.faults.is_empty();
    let document = json!({
        "whole": whole,
        "records": answer.records,
        "first": answer.first,
        "last": answer.last,
        "hash": answer.hash,
        "faults": answer.faults,
    });
    out.show(&document, || {
        let mut text = fields(&[
            ("records", format!("{} ({} to {})", answer.records, answer.first, answer.last)),
            ("newest", format!("{}:{}", answer.last, answer.hash)),
            ("whole", if whole { "yes" } else { "NO" }.to_owned()),
        ]);
        for fault in &answer.faults {
            text += &format!("  {fault}\n");
        }
        text
    });
    if whole {
        return Ok(());
    }
    Err(Failure::new(Kind::Failed, OBJECT, format!("is not whole: {}", answer.faults.join("; ")))
        .hint("compare with a copy that is kept elsewhere; whoever can write the coordinator's folder did this"))
}

fn document(record: &v1::AuditRecord) -> Value {
    json!({
        "number": record.number,
        "time": json_time(record.time_ns),
        "actor": record.actor,
        "method": record.method,
        "request_id": record.request_id,
        "objects": record.objects,
        "outcome": record.outcome,
        "previous_hash": record.previous_hash,
    })
}

fn listed(records: &[v1::AuditRecord]) -> String {
    if records.is_empty() {
        return "no records".to_owned();
    }
    table(
        &[">NUMBER", "TIME", "WHO", "METHOD", "WHAT", "OUTCOME"],
        records.iter().map(|record| {
            vec![
                text(record.number.to_string()),
                text(show_time(record.time_ns)),
                text(&record.actor),
                text(&record.method),
                text(record.objects.join(", ")),
                text(&record.outcome),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_expected_has_a_number_and_a_hash() {
        assert!(expected(&format!("3:{}", "A".repeat(64))).is_ok_and(|(n, h)| n == 3 && h == "a".repeat(64)));
        for bad in ["", "3", "3:", "x:00", &format!("3:{}", "g".repeat(64))] {
            assert!(expected(bad).is_err(), "{bad}");
        }
    }
}
