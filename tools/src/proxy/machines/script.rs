//! Scripts of this host's that plans run, and looks whether something accepts. The script is told in its environment what for; it
//! ends with 0 for yes, with 3 for not yet, with anything else if it has failed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use afterimage_controlplane::plan::PlanVerb;
use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{Checked, CommandErrorKind as Kind, LookAt, RunScript};
use tokio::sync::OnceCell;

use super::super::commands::{Refused, refused};
use super::super::config::machines::Script;
use super::super::state::Proxy;
use super::{DriveError, aside, command, ready, settings};

/// Scripts whose end is kept for who asks again.
const KEPT: usize = 256;

type Answer = Rc<OnceCell<Result<Checked, String>>>;

/// What came of scripts: asked again, by another coordinator say, one is not run again, but waited for.
#[derive(Default)]
pub struct Ran(RefCell<VecDeque<(String, Answer)>>);

impl Ran {
    fn of(&self, key: &str) -> Answer {
        let mut kept = self.0.borrow_mut();
        if let Some((_, answer)) = kept.iter().find(|(known, _)| known == key) {
            return Rc::clone(answer);
        }
        if kept.len() == KEPT {
            kept.pop_front();
        }
        let answer = Answer::default();
        kept.push_back((key.to_owned(), Rc::clone(&answer)));
        answer
    }
}

fn execute(script: &Script, said: &RunScript) -> Result<Checked, DriveError> {
    let name = format!("the script \"{}\"", said.script);
    let variables = [
        ("AFTERIMAGE_PLAN", said.plan.clone()),
        ("AFTERIMAGE_RUN", said.run.clone()),
        ("AFTERIMAGE_STEP", said.step.clone()),
        ("AFTERIMAGE_GROUP", said.group.clone()),
        ("AFTERIMAGE_VERB", PlanVerb::from(said.verb()).as_str().to_owned()),
        ("AFTERIMAGE_WHEN", said.when.clone()),
        ("AFTERIMAGE_ATTEMPT", said.attempt.to_string()),
    ];
    let (yes, detail) = command::ask(&name, &script.command, b"", &variables, script.deadline)?;
    Ok(Checked { yes, detail })
}

/// Runs a script, once for each try of a run's step.
pub async fn run(proxy: &Proxy, said: RunScript) -> Result<Outcome, Refused> {
    let script = settings(&proxy.config.machines.scripts, "script", &said.script)?.clone();
    if said.when == "ready" {
        return Ok(Outcome::Checked(aside(move || execute(&script, &said)).await?));
    }
    let key = format!("{} {} {} {} {}", said.run, said.step, said.when, said.script, said.attempt);
    let answer = proxy.scripts.of(&key);
    let ran =
        answer.get_or_init(async || aside(move || execute(&script, &said)).await.map_err(|e| e.to_string())).await;
    match ran {
        Ok(checked) => Ok(Outcome::Checked(checked.clone())),
        Err(why) => refused(Kind::Io, why),
    }
}

/// Looks once whether something accepts.
pub async fn look(said: LookAt) -> Result<Outcome, Refused> {
    let look = move || {
        let (yes, detail) = match ready::accepts(&said.address) {
            Ok(address) => (true, format!("{address} accepts")),
            Err(why) => (false, why),
        };
        Ok(Checked { yes, detail })
    };
    Ok(Outcome::Checked(aside(look).await?))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use afterimage_wire::v1;

    use super::*;

    fn script(text: &str, deadline: Duration) -> Script {
        Script { command: ["/bin/sh", "-c", text].map(str::to_owned).into(), deadline }
    }

    fn said() -> RunScript {
        RunScript {
            script: "dns".into(),
            plan: "tenants/default/plans/site".into(),
            step: "web".into(),
            when: "then".into(),
            verb: v1::PlanVerb::Undo.into(),
            attempt: 2,
            ..RunScript::default()
        }
    }

    #[test]
    fn a_script_is_told_what_for_and_says_yes_no_or_why_not() {
        let run = |text: &str| execute(&script(text, Duration::from_secs(10)), &said());
        let text = "echo $AFTERIMAGE_PLAN $AFTERIMAGE_STEP $AFTERIMAGE_WHEN $AFTERIMAGE_VERB $AFTERIMAGE_ATTEMPT";
        let detail = "tenants/default/plans/site web then undo 2".to_owned();
        assert_eq!(run(text), Ok(Checked { yes: true, detail }));
        assert_eq!(run("echo not yet; exit 3"), Ok(Checked { yes: false, detail: "not yet".into() }));
        let error = run("echo no route >&2; exit 1").unwrap_err().to_string();
        assert!(error.contains("\"dns\" ended with 1: no route"), "{error}");
        let error = execute(&script("sleep 9", Duration::from_millis(50)), &said()).unwrap_err().to_string();
        assert!(error.contains("not done within 0.05 s"), "{error}");
    }

    #[test]
    fn who_asks_again_gets_the_same_answer_until_there_are_many() {
        let ran = Ran::default();
        let first = ran.of("a");
        assert!(Rc::ptr_eq(&first, &ran.of("a")) && !Rc::ptr_eq(&first, &ran.of("b")));
        (0..KEPT).for_each(|n| drop(ran.of(&n.to_string())));
        assert!(!Rc::ptr_eq(&first, &ran.of("a")));
    }

    #[test]
    fn a_port_accepts_or_not() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap().to_string();
        let seen = |address: &str| {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            match runtime.block_on(look(LookAt { address: address.to_owned() })) {
                Ok(Outcome::Checked(found)) => found,
                other => panic!("{other:?}"),
            }
        };
        let found = seen(&at);
        assert!(found.yes && found.detail.contains("accepts"), "{found:?}");
        drop(listener);
        let found = seen(&at);
        assert!(!found.yes && found.detail.contains("nothing accepts at 127.0.0.1"), "{found:?}");
    }
}
