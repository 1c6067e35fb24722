//! Ratios of runs that were made in pairs.

use super::compare::middle;

/// Median of the ratios pair by pair, with the lowest and the highest: a drift of the machine is in both halves of a pair.
#[derive(Copy, Clone, Debug, PartialEq)]
pub struct Ratio {
    /// The median.
    pub median: f64,
    /// Of the pairs.
    pub lowest: f64,
    /// Of the pairs.
    pub highest: f64,
}

impl Ratio {
    /// Of `(one, other)`: one over other. There must be a pair.
    pub fn of(pairs: &[(f64, f64)]) -> Self {
        let mut ratios: Vec<f64> = pairs.iter().map(|(one, other)| one / other.max(f64::MIN_POSITIVE)).collect();
        ratios.sort_by(f64::total_cmp);
        Self { median: middle(&ratios), lowest: ratios[0], highest: ratios[ratios.len() - 1] }
    }
}

impl std::fmt::Display for Ratio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} [{:.2}–{:.2}]", self.median, self.lowest, self.highest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_the_pairs_and_their_spread() {
        let found = Ratio::of(&[(10.0, 10.0), (20.0, 10.0), (90.0, 30.0)]);
        assert_eq!(found, Ratio { median: 2.0, lowest: 1.0, highest: 3.0 });
        assert_eq!(found.to_string(), "2.00 [1.00–3.00]");
    }
}
