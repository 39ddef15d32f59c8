"""Chains, groups and chords as values: what graph of jobs they become, and what is refused."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from pgqueue import PayloadError, PgQueue, Signature, chain, chord, group
from pgqueue.canvas import Canvas
from pgqueue.graph import CanvasNode, CanvasRequest

app = PgQueue("tests", task_routes={"elsewhere.*": {"queue": "away", "dead_letter_queue": "lost"}})


@app.task(dead_letter_queue="failed_sums")
def add(a: int, b: int) -> int:
    return a + b


@app.task(history=False, queue="sums")
def total(numbers: list[int], *, scale: int = 1) -> int:
    return sum(numbers) * scale


@app.task
def day_of(day: datetime, name: str) -> str:
    return name


def graph(canvas: Canvas[Any], *args: Any, **options: Any) -> CanvasRequest:
    return canvas.request(args, {}, options)[1]


def jobs(request: CanvasRequest) -> list[CanvasNode]:
    return [node for node in request.nodes if node.request is not None]


def args_of(node: CanvasNode) -> list[Any]:
    assert node.request is not None
    args: list[Any] = json.loads(node.request.args)
    return args


class TestGraph:
    def test_a_chain_is_one_job_after_another(self) -> None:
        request = graph(chain(add.s(1, 2), add.s(3), add.si(4, 5)))
        first, second, third = request.nodes
        assert [args_of(node) for node in request.nodes] == [[1, 2], [3], [4, 5]]
        assert (first.after, second.after, third.after) == (None, first.id, second.id)
        assert [node.takes_result for node in request.nodes] == [False, True, False]
        assert [node.keeps_result for node in request.nodes] == [True, False, True], "as somebody wants it"
        assert request.output == third.id

    def test_chains_in_chains_are_one_chain(self) -> None:
        steps = chain(chain(add.s(1, 2), add.s(3)), add.s(4)) | chain(add.s(5), add.s(6))
        assert isinstance(steps, chain)
        assert [step.args for step in steps.steps if isinstance(step, Signature)] == [
            (1, 2), (3,), (4,), (5,), (6,),
        ]  # fmt: skip

    def test_a_group_ends_in_a_join(self) -> None:
        request = graph(group(add.s(n, n) for n in range(3)))
        join, *members = request.nodes
        assert join.request is None
        assert request.output == join.id
        assert [member.member_of for member in members] == [join.id] * 3
        assert all(member.keeps_result and member.after is None for member in members)
        assert not join.skips_failed

    @pytest.mark.parametrize(
        "canvas",
        [
            chord([add.s(1, 1), add.s(2, 2)], total.s()),
            chord(group(add.s(1, 1), add.s(2, 2)), total.s()),
            group(add.s(1, 1), add.s(2, 2)) | total.s(),
            chain(group(add.s(1, 1), add.s(2, 2)), total.s()),
        ],
    )
    def test_a_chord_is_a_group_and_what_comes_after(self, canvas: Canvas[Any]) -> None:
        request = graph(canvas)
        join, one, two, body = request.nodes
        assert (one.member_of, two.member_of, body.member_of) == (join.id, join.id, None)
        assert (body.after, body.takes_result, request.output) == (join.id, True, body.id)
        assert one.keeps_result

    def test_results_that_nobody_wants_are_not_kept(self) -> None:
        request = graph(chord([add.s(1, 1), add.s(2, 2)], total.si([])))
        join, one, two, body = request.nodes
        assert not any(node.keeps_result for node in (join, one, two))
        assert body.keeps_result

    def test_nested(self) -> None:
        request = graph(
            chain(add.s(1, 1), group(chain(add.s(2), add.s(3)), group(add.s(4), add.s(5))), total.s())
        )
        start, outer, two, three, inner, four, five, body = request.nodes
        assert [node.request is None for node in request.nodes] == [
            False, True, False, False, True, False, False, False,
        ]  # fmt: skip
        assert (two.after, three.after, four.after, five.after) == (start.id, two.id, start.id, start.id)
        assert (three.member_of, inner.member_of, four.member_of) == (outer.id, outer.id, inner.id)
        assert two.member_of is None
        assert body.after == outer.id
        assert all(node.keeps_result for node in (start, outer, two, three, inner, four, five, body))

    def test_skip(self) -> None:
        members = [add.s(1, 1), add.s(2, 2)]
        assert graph(group(members, on_member_failure="skip")).nodes[0].skips_failed
        assert graph(chord(members, total.s(), on_member_failure="skip")).nodes[0].skips_failed
        kept = chord(group(members, on_member_failure="skip"), total.s())
        assert graph(kept).nodes[0].skips_failed
        with pytest.raises(ValueError, match="on_member_failure must be 'fail' or 'skip', got 'ignore'"):
            group(members, on_member_failure="ignore")  # type: ignore[arg-type]

    def test_a_body_without_a_header_gets_an_empty_list(self) -> None:
        assert [args_of(node) for node in graph(chord([], total.s())).nodes] == [[[]]]
        first, body = graph(chain(add.s(1, 1), chord([], total.s()))).nodes
        assert (args_of(body), body.after, body.takes_result) == ([[]], first.id, False)

    def test_arguments_of_the_call_go_to_where_it_starts(self) -> None:
        assert [args_of(n) for n in jobs(graph(chain(add.s(1), add.s(2)), 5))] == [[5, 1], [2]]
        assert [args_of(n) for n in jobs(graph(group(add.s(1), add.s(2)), 5))] == [[5, 1], [5, 2]]
        assert [args_of(n) for n in jobs(graph(chord([add.s(1)], total.s()), 5))] == [[5, 1], []]
        assert [args_of(n) for n in jobs(graph(chain(add.si(1, 1), add.s(2)), 5))] == [[1, 1], [2]]

    def test_options_are_the_defaults_of_all_and_the_start_waits(self) -> None:
        request = graph(
            chain(add.s(1, 1), add.s(2).set(queue="mine", countdown=7), total.si([])),
            queue="all",
            countdown=3,
        )
        found = [(n.request.queue, n.request.countdown) for n in request.nodes if n.request is not None]
        assert found == [("all", 3.0), ("mine", 7.0), ("all", None)]

    def test_links(self) -> None:
        request = graph(chain(add.s(1, 1).link(add.s(9)), add.s(2)).link(add.s(7) | add.s(8)))
        one, side, two, seven, eight = request.nodes
        assert request.output == two.id
        assert [node.after for node in (side, two, seven, eight)] == [one.id, one.id, two.id, seven.id]

    def test_error_links(self) -> None:
        whole = chain(add.s(1, 1).link_error(day_of.s("own")), add.s(2)).link_error(
            day_of.si(datetime.now(UTC), "x")
        )
        one, two = graph(whole).nodes
        assert [(job.takes_id, job.own) for job in one.on_error] == [(True, True)]
        assert [(job.takes_id, job.own) for job in two.on_error] == [(False, False)]
        with pytest.raises(TypeError, match="link_error takes a call of one task"):
            graph(add.s(1, 1).link_error(chain(add.s(1, 1), add.s(2))))  # type: ignore[arg-type]

    def test_jobs_know_their_canvas_and_have_history(self) -> None:
        request = graph(chord([add.s(1, 1)], total.s()))
        for node in jobs(request):
            assert node.request is not None
            assert json.loads(node.request.headers)["pgqueue"]["canvas"] == request.id
            assert node.request.history

    def test_labels_of_what_cannot_run(self) -> None:
        request = graph(chain(add.s(1, 1), app.signature("elsewhere.task"), total.s()))
        assert [node.dead_letter_queue for node in request.nodes] == ["failed_sums", "lost", None]

    def test_ten_thousand_steps(self) -> None:
        assert len(graph(chain(add.s(1, 1), *(add.s(n) for n in range(9_999)))).nodes) == 10_000


class TestRefused:
    def test_what_a_partial_call_lacks_or_has_too_much(self) -> None:
        with pytest.raises(TypeError, match="missing a required argument: 'b'"):
            graph(chain(add.s(1, 1), add.s()))
        with pytest.raises(TypeError, match="too many positional arguments"):
            graph(chain(add.s(1, 1), add.s(2, 3)))
        with pytest.raises(TypeError, match="missing a required argument"):
            graph(chain(add.s(1), add.s(2)))

    def test_arguments_behind_a_result_are_checked_by_their_annotation(self) -> None:
        with pytest.raises(PayloadError, match="b must be int"):
            graph(chain(add.s(1, 1), add.s("two")))
        with pytest.raises(PayloadError, match="scale must be int"):
            graph(chord([add.s(1, 1)], total.s(scale="large")))
        (_, step) = graph(chain(add.s(1, 1), day_of.s("x"))).nodes
        assert args_of(step) == ["x"]

    @pytest.mark.parametrize("option", ["job_id", "unique_key"])
    def test_options_that_say_which_job_it_is(self, option: str) -> None:
        with pytest.raises(ValueError, match=f"{option} has no meaning for a job of a canvas"):
            graph(chain(add.s(1, 1), add.s(2).set(**{option: "018f"})))  # type: ignore[misc]
        with pytest.raises(ValueError, match=f"{option} has no meaning for a job of a canvas"):
            graph(chain(add.s(1, 1)), **{option: "018f"})

    def test_what_is_no_call(self) -> None:
        for wrong in (
            lambda: chain(add),
            lambda: group([1, 2]),
            lambda: chord("ab", total.s()),
            lambda: add.s(1) | 3,
        ):
            with pytest.raises(TypeError, match="takes calls made with task"):
                wrong()  # type: ignore[no-untyped-call]
        with pytest.raises(ValueError, match="a chain needs at least one step"):
            chain()
        with pytest.raises(ValueError, match="a group needs at least one member"):
            graph(chain(add.s(1, 1), group()))
        with pytest.raises(ValueError, match="a group needs at least one member"):
            graph(group([]))
        with pytest.raises(TypeError, match="a chord needs a body"):
            graph(chord([add.s(1, 1)]))

    def test_nesting_without_end(self) -> None:
        nested: Canvas[Any] = add.s(1, 1)
        for _ in range(40):
            nested = group(nested)
        with pytest.raises(ValueError, match="nested at most 32 levels deep"):
            graph(nested)

    def test_applications(self) -> None:
        other = PgQueue("other")
        with pytest.raises(ValueError, match="a canvas is of one application"):
            graph(chain(add.s(1, 1), other.signature("a.b")))
        with pytest.raises(ValueError, match="nothing in it says whose application it is"):
            graph(chain(Signature("a.b"), Signature("c.d")))
        assert len(graph(chain(add.s(1, 1), Signature("c.d"))).nodes) == 2

    def test_links_where_single_jobs_are_enqueued(self) -> None:
        with pytest.raises(ValueError, match="enqueue_many takes no links"):
            app.enqueue_many([add.s(1, 1).link(add.s(1))])
        with pytest.raises(ValueError, match="enqueue_many takes no links"):
            app.enqueue_many([Signature("a.b", (), {}, {"link": add.s(1)})])

    @pytest.mark.parametrize("kwargs", [[], "", 0])
    def test_arguments_that_are_no_mapping_are_refused_though_empty(self, kwargs: Any) -> None:
        with pytest.raises(TypeError, match="kwargs must be a mapping"):
            app.enqueue_many([Signature(add.name, (1, 1), kwargs)])
