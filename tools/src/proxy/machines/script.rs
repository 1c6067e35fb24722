//! Scripts of this host's that plans run, and looks whether something accepts. The script is told in its environment what for; it
//! ends with 0 for yes, with 3 for not yet, with anything else if it has failed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::{TcpStream, ToSocketAddrs};
use std::rc::Rc;
use std::time::Duration;

use afterimage_wire::v1::command_result::Outcome;
use afterimage_wire::v1::{Checked, CommandErrorKind as Kind, LookAt, PlanVerb, RunScript};
use tokio::sync::OnceCell;

use super::super::commands::{Refused, refused};
use super::super::config::machines::Script;
use super::super::state::Proxy;
use super::{DriveError, aside, command, settings, short};

/// The exit code for "no": not yet.
const NO: i32 = 3;
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(2);
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

fn verb(verb: PlanVerb) -> &'static str {
    match verb {
        PlanVerb::Unspecified | PlanVerb::Run => "run",
        PlanVerb::Test => "test",
        PlanVerb::Undo => "undo",
    }
}

fn execute(script: &Script, said: &RunScript) -> Result<Checked, DriveError> {
    let name = format!("the script \"{}\"", said.script);
    let variables = [
        ("AFTERIMAGE_PLAN", said.plan.clone()),
        ("AFTERIMAGE_RUN", said.run.clone()),
        ("AFTERIMAGE_STEP", said.step.clone()),
        ("AFTERIMAGE_GROUP", said.group.clone()),
        ("AFTERIMAGE_VERB", verb(said.verb()).to_owned()),
        ("AFTERIMAGE_WHEN", said.when.clone()),
        ("AFTERIMAGE_ATTEMPT", said.attempt.to_string()),
    ];
    let ran = command::run(&script.command, b"", &variables, script.deadline)
        .map_err(|error| DriveError::failed(format!("{name} ({}) cannot be started: {error}", script.command[0])))?;
    let detail = short(&ran.said);
    match ran.code {
        Some(0) => Ok(Checked { yes: true, detail }),
        Some(NO) => Ok(Checked { yes: false, detail }),
        _ if ran.late => {
            let within = script.deadline.as_secs_f32();
            Err(DriveError::failed(format!("{name} was not done within {within} s: {detail}")))
        }
        Some(code) => Err(DriveError::failed(format!("{name} ended with {code}: {detail}"))),
        None => Err(DriveError::failed(format!("{name} was killed: {detail}"))),
    }
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

fn accepts(address: &str) -> Checked {
    let addresses = match address.to_socket_addrs() {
        Ok(addresses) => addresses,
        Err(error) => return Checked { yes: false, detail: format!("{address}: {error}") },
    };
    let mut why = format!("{address} has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(_) => return Checked { yes: true, detail: format!("{address} accepts") },
            Err(error) => why = format!("nothing accepts at {address}: {error}"),
        }
    }
    Checked { yes: false, detail: why }
}

/// Looks once whether something accepts.
pub async fn look(said: LookAt) -> Result<Outcome, Refused> {
    Ok(Outcome::Checked(aside(move || Ok(accepts(&said.address))).await?))
}

#[cfg(test)]
mod tests {
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
            verb: PlanVerb::Undo.into(),
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
        assert!(accepts(&at).yes);
        drop(listener);
        let found = accepts(&at);
        assert!(!found.yes && found.detail.contains("nothing accepts at 127.0.0.1"), "{found:?}");
    }
}
