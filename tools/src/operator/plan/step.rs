//! A step of a plan as it is typed, and as it is shown: `web after=db delay=10s tcp=10.0.0.7:80 then=dns@dr`. What is shown can be
//! typed back.

use afterimage_wire::v1;

use crate::operator::documents::id;
use crate::operator::values::duration_ns;

/// What a step may say, for messages.
pub const ALLOWED: &str = "GROUP, and of these, behind spaces: as=ID after=ID,ID delay=10s tcp=HOST:PORT[@PROXY] \
                           ready=SCRIPT[@PROXY] within=5m retries=2 before=SCRIPT[@PROXY] then=SCRIPT[@PROXY], and before and \
                           then for other verbs: test-before= test-then= undo-before= undo-then=";
/// How long a step has to answer unless told, milliseconds.
const READY_MS: u64 = 300_000;

fn ms(text: &str) -> Result<u64, String> {
    let ns = duration_ns(text)?;
    if ns.is_multiple_of(1_000_000) {
        Ok(ns / 1_000_000)
    } else {
        Err(format!("{text} is no whole number of milliseconds"))
    }
}

fn at<'a>(value: &'a str, full: &impl Fn(&str, &str) -> String) -> (&'a str, String) {
    match value.rsplit_once('@') {
        Some((what, proxy)) => (what, full("proxies", proxy)),
        None => (value, String::new()),
    }
}

/// Reads a step. `full` makes a name of a collection and an id.
///
/// # Errors
/// What it says that makes no sense.
pub fn parse(text: &str, full: impl Fn(&str, &str) -> String) -> Result<v1::PlanStep, String> {
    let mut words = text.split_whitespace();
    let group = words.next().filter(|word| !word.contains('=')).ok_or_else(|| format!("a step is {ALLOWED}"))?;
    let mut step = v1::PlanStep { group: full("groups", group), ..v1::PlanStep::default() };
    for word in words {
        let (key, value) = word.split_once('=').ok_or_else(|| format!("`{word}`: a step is {ALLOWED}"))?;
        let (what, proxy) = at(value, &full);
        match key {
            "as" => value.clone_into(&mut step.id),
            "after" => step.after.extend(value.split(',').filter(|id| !id.is_empty()).map(str::to_owned)),
            "delay" => step.delay_ms = ms(value)?,
            "within" => step.ready_within_ms = Some(ms(value)?),
            "retries" => step.retries = value.parse().map_err(|_| format!("retries: `{value}` is no number"))?,
            "tcp" | "ready" if step.check.is_some() => return Err("tcp or ready, once".to_owned()),
            "tcp" => {
                let what = v1::plan_check::What::Tcp(what.to_owned());
                step.check = Some(v1::PlanCheck { what: Some(what), proxy });
            }
            "ready" => {
                let what = v1::plan_check::What::Script(what.to_owned());
                step.check = Some(v1::PlanCheck { what: Some(what), proxy });
            }
            _ => {
                let (verb, when) = key.split_once('-').unwrap_or(("run", key));
                let verb = match verb {
                    "run" => v1::PlanVerb::Run,
                    "test" => v1::PlanVerb::Test,
                    "undo" => v1::PlanVerb::Undo,
                    _ => return Err(format!("`{key}`: a step is {ALLOWED}")),
                };
                let script = v1::PlanScript { script: what.to_owned(), proxy, verbs: vec![verb.into()] };
                match when {
                    "before" => step.before.push(script),
                    "then" => step.then.push(script),
                    _ => return Err(format!("`{key}`: a step is {ALLOWED}")),
                }
            }
        }
    }
    Ok(step)
}

/// When a step counts as answering, beside what its machines say; empty for nothing more.
pub fn ready(step: &v1::PlanStep) -> String {
    let Some(check) = &step.check else { return String::new() };
    let proxy = if check.proxy.is_empty() { String::new() } else { format!("@{}", id(&check.proxy)) };
    match &check.what {
        Some(v1::plan_check::What::Tcp(at)) => format!("tcp={at}{proxy}"),
        Some(v1::plan_check::What::Script(name)) => format!("ready={name}{proxy}"),
        None => String::new(),
    }
}

/// The scripts of a step, as they are typed.
pub fn scripts(step: &v1::PlanStep) -> Vec<String> {
    let shown = |when: &str, script: &v1::PlanScript| -> Vec<String> {
        let proxy = if script.proxy.is_empty() { String::new() } else { format!("@{}", id(&script.proxy)) };
        let verb = |verb| match verb {
            v1::PlanVerb::Unspecified | v1::PlanVerb::Run => "",
            v1::PlanVerb::Test => "test-",
            v1::PlanVerb::Undo => "undo-",
        };
        script.verbs().map(|v| format!("{}{when}={}{proxy}", verb(v), script.script)).collect()
    };
    let before = step.before.iter().flat_map(|script| shown("before", script));
    before.chain(step.then.iter().flat_map(|script| shown("then", script))).collect()
}

fn exact(ms: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(3_600_000, "h"), (60_000, "m"), (1_000, "s"), (1, "ms")];
    let (unit, word) = UNITS.iter().find(|(unit, _)| ms.is_multiple_of(*unit)).unwrap_or(&UNITS[3]);
    format!("{}{word}", ms / unit)
}

/// A step as it can be typed.
pub fn typed(step: &v1::PlanStep) -> String {
    let group = id(&step.group);
    let mut words = vec![group.to_owned()];
    if !step.id.is_empty() && step.id != group {
        words.push(format!("as={}", step.id));
    }
    if !step.after.is_empty() {
        words.push(format!("after={}", step.after.join(",")));
    }
    if step.delay_ms > 0 {
        words.push(format!("delay={}", exact(step.delay_ms)));
    }
    words.extend(Some(ready(step)).filter(|ready| !ready.is_empty()));
    words.extend(step.ready_within_ms.filter(|ms| *ms != READY_MS).map(|ms| format!("within={}", exact(ms))));
    if step.retries > 0 {
        words.push(format!("retries={}", step.retries));
    }
    words.extend(scripts(step));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(kind: &str, id: &str) -> String {
        format!("tenants/default/{kind}/{id}")
    }

    #[test]
    fn what_is_shown_of_a_step_can_be_typed_back() {
        for text in [
            "db",
            "web as=front after=db,app delay=90s tcp=10.0.0.7:80@dr within=1m retries=2 before=dns undo-before=dns@dr then=tell",
            "app after=db ready=app-up test-then=look",
        ] {
            let step = parse(text, full).unwrap();
            assert_eq!(typed(&step), text);
            assert_eq!(parse(&typed(&step), full).unwrap(), step);
        }
        let step = parse("web tcp=[::1]:80 after=a after=b", full).unwrap();
        assert_eq!((step.after.len(), ready(&step).as_str()), (2, "tcp=[::1]:80"));
    }

    #[test]
    fn what_makes_no_sense_is_said() {
        for (text, word) in [
            ("", "GROUP"),
            ("after=db", "GROUP"),
            ("db soon", "`soon`"),
            ("db delay=5", "no duration"),
            ("db retries=x", "no number"),
            ("db tcp=a:1 ready=b", "once"),
            ("db later-then=x", "`later-then`"),
            ("db undo-never=x", "`undo-never`"),
        ] {
            let error = parse(text, full).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
