from readapt_ray.evaluation.tables import aligned_table, markdown_table, p_value, signed, value


def test_a_cell_of_a_markdown_table_cannot_end_its_cell_or_line() -> None:
    lines = markdown_table(["run", "nDCG@10"], [["a|b\nc_d <i>", "0.5000"], ["---", ""]])
    assert lines == ["| run | nDCG@10 |", "| --- | --- |", r"| a\|b c\_d &lt;i&gt; | 0.5000 |", "| --- |  |"]


def test_columns_are_aligned_without_blanks_at_the_end() -> None:
    assert aligned_table([("artifact", "", "x"), ("a", "bb", "")]) == "artifact      x\na         bb"


def test_numbers() -> None:
    assert [value(0.31594), value(None)] == ["0.3159", ""]
    assert [signed(-0.0125), signed(0.5)] == ["−0.0125", "+0.5000"]
    assert [p_value(None), p_value(0.00001), p_value(0.25)] == ["no test", "< 0.0001", "0.2500"]
