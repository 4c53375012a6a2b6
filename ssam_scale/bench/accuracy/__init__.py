"""`ssam-scale bench accuracy`: top-1 against overhead, method by method, after equal tuning.

In reading order: `config.study` says what a study is, `cells` which runs it consists of and in which order, `work` has
them done, one by one by `train`, `results` keeps what has finished, and `report` makes the table, the chart and the
recommendation of it.
"""
