//! Columns that line up, for `list` and its kin.

/// Rows under headings; columns are as wide as their widest cell.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    right: &'static [usize],
}

impl Table {
    /// A table with these headings; the columns numbered in `right` hold numbers and are set to the right.
    pub(crate) fn new(headings: &[&str], right: &'static [usize]) -> Table {
        Table { rows: vec![headings.iter().map(|heading| (*heading).to_owned()).collect()], right }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[column] - cell.chars().count());
                let gap = if column == 0 { "" } else { "  " };
                let (before, after) = if self.right.contains(&column) { (&*pad, "") } else { ("", &*pad) };
                line.extend([gap, before, cell, after]);
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_do_not_trail() {
        let mut table = Table::new(&["NAME", "MEMORY", "STATE"], &[1]);
        table.row(["web1".to_owned(), "512.0 MiB".to_owned(), "running".to_owned()]);
        table.row(["database".to_owned(), "1.0 GiB".to_owned(), "".to_owned()]);
        assert_eq!(
            table.render(),
            "NAME         MEMORY  STATE\nweb1      512.0 MiB  running\ndatabase    1.0 GiB\n"
        );
    }
}
