//! Comparing: the hashes that a source sends of its disk, against what is held at that place of the stream.
//!
//! ```text
//! durable ─▶ indexed ─▶ question ─▶ read, as a view of that place would be ─▶ hashed ─▶ answer ─▶ connection
//! ```
//! A question pins its place: nothing newer is folded into the image below it until it is answered. What cannot be read
//! differs. Answers wait here, not with a connection: one whose frames were on their way when its connection broke is
//! given into the next. The source asks again what may have been lost.

use std::collections::VecDeque;

use afterimage_wire::ids::IncarnationId;
use afterimage_wire::record::Record;

use crate::host::{Answer, DiskKey};
use crate::seal::HashKey;
use crate::view::{ReadRequest, Reads};

/// Keys of reads with these upper two bits are a comparison's. With the highest bit they are a shelf's; those of views
/// count up from the lowest.
const KEYS: u32 = 1 << 30;
/// Questions and answers of a stream that are kept. A source has fewer open; what is more is answered by "all of it".
const MAX_QUESTIONS: usize = 4096;
/// Questions of a stream whose reads are under way.
const MAX_READING: usize = 4;

/// A record of hashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    pub record: Record,
    pub hashes: Vec<u8>,
}

/// The questions of one stream.
#[derive(Debug, Default)]
pub(crate) struct Compare {
    /// Their writer.
    writer: IncarnationId,
    /// By rising number; the first `reading` of them, at most, are being read.
    questions: VecDeque<Question>,
    begun: VecDeque<u64>,
    /// Record, and which of its steps differ.
    answers: VecDeque<(u64, u64)>,
    /// Answered since the start: questions, and steps that differed.
    pub asked: u64,
    pub differed: u64,
}

/// The stream that a read is for, if it is a comparison's.
pub(crate) fn stream_of(key: DiskKey) -> Option<u32> {
    (key.0 >> 30 == 1).then_some(key.0 & !KEYS)
}

impl Compare {
    /// Takes what was indexed of `writer`.
    pub fn take(&mut self, writer: IncarnationId, questions: impl Iterator<Item = Question>) {
        for question in questions {
            if self.writer != writer {
                self.forget();
                self.writer = writer;
            }
            if self.questions.len() < MAX_QUESTIONS {
                self.questions.push_back(question);
            } else {
                self.answer(question.record.seq, u64::MAX);
            }
        }
    }

    /// The writer is gone: nobody waits for an answer.
    fn forget(&mut self) {
        // Reads under way end without an answer.
        self.begun.clear();
        self.questions.clear();
        self.answers.clear();
    }

    /// The oldest place that is needed.
    pub fn pin(&self) -> Option<u64> {
        self.questions.front().map(|question| question.record.seq)
    }

    /// Begins what may be begun.
    pub fn turn(&mut self, stream: u32, reads: &mut Reads) {
        while self.begun.len() < MAX_READING
            && let Some(next) = self.questions.iter().find(|question| !self.begun.contains(&question.record.seq))
        {
            let record = &next.record;
            self.begun.push_back(record.seq);
            reads.ask(ReadRequest {
                key: DiskKey(KEYS | stream),
                cookie: record.seq,
                slot: record.disk,
                seq: record.seq,
                delta: None,
                view: None,
                shelf: None,
                stream,
                offset: record.offset,
                len: record.len as usize,
            });
        }
    }

    /// A read has ended.
    pub fn read(&mut self, key: &HashKey, answer: Answer) {
        let Some(begun) = self.begun.iter().position(|seq| *seq == answer.cookie) else { return };
        self.begun.remove(begun);
        let Some(at) = self.questions.iter().position(|question| question.record.seq == answer.cookie) else { return };
        let Some(Question { record, hashes }) = self.questions.remove(at) else { return };
        let differs = match answer.result {
            Ok(Some(part)) => key.differs(record.disk, record.offset, &part.buf[part.at..part.at + part.len], &hashes),
            Ok(None) | Err(_) => u64::MAX,
        };
        self.asked += 1;
        self.differed += u64::from(differs.count_ones());
        self.answer(record.seq, differs);
    }

    fn answer(&mut self, seq: u64, differs: u64) {
        if self.answers.len() == MAX_QUESTIONS {
            // Nobody has fetched it for long; who still wants it asks again.
            self.answers.pop_front();
        }
        self.answers.push_back((seq, differs));
    }

    /// The next answer to be sent.
    pub fn next_answer(&mut self) -> Option<(u64, u64)> {
        self.answers.pop_front()
    }

    /// There is something to send.
    pub fn has_answers(&self) -> bool {
        !self.answers.is_empty()
    }
}
