//! A min-heap that reports the position of each item, so that any item can be removed.
//!
//! ```text
//!   entries   [ 3·c, 5·a, 4·b ]        place(c, 0)  place(a, 1)  place(b, 2)
//! ```
//!
//! The heap holds keys and items. It reports each item's position to the owner of the items through
//! `place`; the owner passes the position to [`Heap::remove`]. Nothing is allocated once the heap
//! has had its largest size.

/// Callback for an item that moved to a position.
pub(crate) type Place<'a, T> = dyn FnMut(T, u32) + 'a;

/// A heap of items `T` by keys `K`; see the module's head.
#[derive(Clone, Debug)]
pub(crate) struct Heap<K, T> {
    entries: Vec<(K, T)>,
}

impl<K, T> Default for Heap<K, T> {
    fn default() -> Self {
        Self { entries: Vec::new() }
    }
}

impl<K: Ord + Copy, T: Copy> Heap<K, T> {
    /// The item with the least key.
    pub fn first(&self) -> Option<(K, T)> {
        self.entries.first().copied()
    }

    /// Inserts an item.
    pub fn insert(&mut self, key: K, item: T, place: &mut Place<'_, T>) {
        self.entries.push((key, item));
        self.rise(self.entries.len() - 1, place);
    }

    /// Removes the item at `position`.
    pub fn remove(&mut self, position: u32, place: &mut Place<'_, T>) {
        let position = position as usize;
        self.entries.swap_remove(position);
        if position < self.entries.len() {
            let position = self.rise(position, place);
            self.sink(position, place);
        }
    }

    /// Changes the key of the item at `position`.
    pub fn rekey(&mut self, position: u32, key: K, place: &mut Place<'_, T>) {
        let position = position as usize;
        self.entries[position].0 = key;
        let position = self.rise(position, place);
        self.sink(position, place);
    }

    /// Inserts the first item, at place 0; `false`, and no change, if there are items.
    pub fn insert_only(&mut self, key: K, item: T) -> bool {
        let is_only = self.entries.is_empty();
        if is_only {
            self.entries.push((key, item));
        }
        is_only
    }

    /// Removes the only item; `false`, and no change, if there are more.
    pub fn remove_only(&mut self) -> bool {
        let is_only = self.entries.len() == 1;
        if is_only {
            self.entries.clear();
        }
        is_only
    }

    /// Changes the key of the only item; `false`, and no change, if there are more.
    pub fn rekey_only(&mut self, new: K) -> bool {
        let [(key, _)] = self.entries.as_mut_slice() else { return false };
        *key = new;
        true
    }

    /// The key and item at a position.
    #[cfg(test)]
    pub fn at(&self, position: u32) -> Option<(K, T)> {
        self.entries.get(position as usize).copied()
    }

    fn rise(&mut self, mut position: usize, place: &mut Place<'_, T>) -> usize {
        while position > 0 {
            let parent = (position - 1) / 2;
            if self.entries[parent].0 <= self.entries[position].0 {
                break;
            }
            self.entries.swap(parent, position);
            place(self.entries[position].1, position as u32);
            position = parent;
        }
        place(self.entries[position].1, position as u32);
        position
    }

    fn sink(&mut self, mut position: usize, place: &mut Place<'_, T>) {
        while let Some(child) = [2 * position + 1, 2 * position + 2]
            .into_iter()
            .filter(|&child| child < self.entries.len())
            .min_by_key(|&child| self.entries[child].0)
        {
            if self.entries[position].0 <= self.entries[child].0 {
                break;
            }
            self.entries.swap(position, child);
            place(self.entries[position].1, position as u32);
            position = child;
        }
        place(self.entries[position].1, position as u32);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn items_come_out_in_order_and_know_their_places(
            steps in prop::collection::vec((0_usize..20, 0_u32..50), 0..200),
        ) {
            // Each step inserts an item, or removes it if it is present; `first` is always the
            // least item present.
            let mut heap = Heap::default();
            let mut places = [None; 20];
            let mut keys = [None; 20];
            for (item, key) in steps {
                let position = places[item].take();
                let mut place = |item: usize, at: u32| places[item] = Some(at);
                if let Some(position) = position {
                    heap.remove(position, &mut place);
                    keys[item] = None;
                } else {
                    heap.insert(key, item, &mut place);
                    keys[item] = Some(key);
                }
                for item in 0..20 {
                    prop_assert_eq!(places[item].is_some(), keys[item].is_some());
                    if let (Some(at), Some(key)) = (places[item], keys[item]) {
                        prop_assert_eq!(heap.entries[at as usize], (key, item));
                    }
                }
                prop_assert_eq!(heap.first().map(|(key, _)| key), keys.iter().flatten().min().copied());
            }
        }
    }
}
