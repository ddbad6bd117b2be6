"""The table of outcomes at the end of a run."""

import resource

from fuzz.harness import Outcome, table


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    called = [report for report in reports if getattr(report, "when", "") == "call"]
    properties = [one for report in called for one in report.user_properties if one[0] == "outcomes"]
    if properties:
        terminalreporter.section("outcomes of spoiled input")
        terminalreporter.write(table(Outcome(*outcome) for _, outcomes in properties for outcome in outcomes))
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        terminalreporter.write_line(f"{used.ru_utime + used.ru_stime:.0f} seconds of CPU in workers")
