//! Random numbers that repeat on any machine: splitmix64 (Steele, Lea, Flood, 2014).

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from `low` to `high`, both included. The bias of the remainder is below 10⁻⁹ for
    /// ranges below 10⁹.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    pub fn below(&mut self, count: usize) -> usize {
        self.between(0, count as u64 - 1) as usize
    }

    /// True in `percent` of 100 calls.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    /// A number of which the logarithm is uniform.
    ///
    /// Computes `(high / low) ^ unit` from square roots, one for each bit of `unit`: IEEE 754 rounds
    /// these alike on every machine, unlike `powf`.
    pub fn log_between(&mut self, low: f64, high: f64) -> f64 {
        let unit = self.next();
        let (mut root, mut power) = (high / low, 1.0);
        for place in 0..32 {
            root = root.sqrt();
            if unit >> place & 1 == 1 {
                power *= root;
            }
        }
        low * power
    }
}

#[test]
fn numbers_are_those_of_the_reference_implementation() {
    // The first outputs of splitmix64 for the seed 1234567, as published with the algorithm.
    let mut random = Random::new(1_234_567);
    assert_eq!([random.next(), random.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
}
