"""`LLM` over a real engine core whose worker is a stand-in: forms of prompts, order, errors, the end."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, SamplingParams
from minivllm.exceptions import EngineDeadError, RequestError
from minivllm.outputs import RequestOutput

FAKE = {"distributed_executor_backend": "tests.fakes:FakeExecutor", "max_model_len": 128, "log_level": "WARNING"}
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **FAKE, disable_frontend_multiprocessing=True) as llm:
        yield llm


def generate(llm: LLM, prompts: Any, params: Any = PARAMS, **kwargs: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False, **kwargs)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_a_prompt_may_be_text_token_ids_or_a_dict_one_or_many(llm: LLM):
    ids = llm.get_tokenizer().encode("hello")
    text = tokens(generate(llm, "hello"))
    for form in (["hello"], ids, [ids], {"prompt": "hello"}, [{"prompt_token_ids": ids}]):
        assert tokens(generate(llm, form)) == text
    assert generate(llm, []) == []


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM):
    prompts = [[i + 1, i + 2] for i in range(20)]
    params = [SamplingParams(max_tokens=20 - i, ignore_eos=True, seed=1) for i in range(20)]
    outputs = generate(llm, prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(ids) for ids in tokens(outputs)] == [20 - i for i in range(20)]
    assert all(output.finished for output in outputs)


def test_the_text_of_a_text_prompt_comes_back(llm: LLM):
    by_text, by_ids = generate(llm, ["hello", [1, 2]])
    assert by_text.prompt == "hello"
    assert by_ids.prompt is None


def test_n_answers_come_in_one_output(llm: LLM):
    (output,) = generate(llm, "hello", SamplingParams(n=3, max_tokens=4, ignore_eos=True, seed=5))
    assert [answer.index for answer in output.outputs] == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompts", "params", "reason"),
    [
        (["fine", []], PARAMS, "prompt 1: the prompt is empty"),
        (["fine", [10**6]], PARAMS, "prompt 1: token id 1000000"),
        (["fine", "word " * 500], PARAMS, "prompt 1: the prompt has"),
        (["fine", 7.5], PARAMS, "prompt 1"),
        (["fine", "fine"], [PARAMS], "2 prompts but 1 sampling_params"),
        (7, PARAMS, "prompts must be"),
        ("fine", SamplingParams(logprobs=50), "prompt 0: logprobs=50"),
    ],
)
def test_one_wrong_prompt_is_named_and_none_is_run(llm: LLM, prompts: Any, params: Any, reason: str):
    with pytest.raises(RequestError, match=reason):
        generate(llm, prompts, params)
    assert not llm.llm_engine.has_unfinished_requests()


def test_an_interrupted_call_leaves_nothing_running(llm: LLM, monkeypatch):
    calm = tokens(generate(llm, ["a", "b"]))
    step = llm.llm_engine.step
    calls = iter(range(100))

    def interrupted() -> list[RequestOutput]:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.llm_engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(llm, ["long"] * 4, SamplingParams(max_tokens=100, ignore_eos=True))
    monkeypatch.undo()
    assert not llm.llm_engine.has_unfinished_requests()
    assert tokens(generate(llm, ["a", "b"])) == calm


def test_chat_renders_the_template_for_one_conversation_or_several(llm: LLM):
    hello = [{"role": "user", "content": "hello"}]
    (one,) = llm.chat(hello, PARAMS, use_tqdm=False)
    assert "hello" in one.prompt and one.prompt != "hello"
    assert one.prompt_token_ids == llm.get_tokenizer().encode(one.prompt, add_special_tokens=False)
    several = llm.chat([hello, hello], PARAMS, use_tqdm=False)
    assert tokens(several) == [*tokens([one]), *tokens([one])]


def test_chat_takes_a_template_as_text_or_file(llm: LLM, tmp_path: Path):
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    path = tmp_path / "template.jinja"
    path.write_text(template)
    for given in (template, str(path)):
        (output,) = llm.chat([{"role": "user", "content": "x"}], PARAMS, use_tqdm=False, chat_template=given)
        assert output.prompt == "[x]"
    with pytest.raises(RequestError, match="no-such-file"):
        llm.chat([{"role": "user", "content": "x"}], PARAMS, use_tqdm=False, chat_template="no-such-file")


def test_a_wrong_message_is_refused(llm: LLM):
    with pytest.raises(RequestError, match="role"):
        llm.chat([{"role": "pirate", "content": "x"}], PARAMS)


def test_the_progress_bar_shows_speeds(llm: LLM, capsys):
    llm.generate(["a", "b"], PARAMS)
    bar = capsys.readouterr().err
    assert "Processed prompts: 100%" in bar and "2/2" in bar and "toks/s" in bar
    generate(llm, "a")
    assert capsys.readouterr().err == ""


def test_the_users_tokenizer_is_a_copy(llm: LLM):
    llm.get_tokenizer()("x " * 50, truncation=True, max_length=3)
    assert len(llm.llm_engine.tokenizer.encode("x " * 50)) > 3


def test_defaults_come_from_the_generation_config(tiny_model: Path):
    options = {"override_generation_config": {"temperature": 0.5, "max_new_tokens": 7}}
    with LLM(tiny_model, **FAKE, **options, disable_frontend_multiprocessing=True) as llm:
        defaults = llm.get_default_sampling_params()
        assert (defaults.temperature, defaults.max_tokens) == (0.5, 7)
        assert len(tokens(llm.generate("hello", use_tqdm=False))[0]) <= 7


def test_in_a_process_of_its_own_the_answers_are_the_same_and_the_process_ends(llm: LLM, tiny_model: Path):
    expected = tokens(generate(llm, ["hello", [1, 2, 3]]))
    with LLM(tiny_model, **FAKE) as other:
        assert tokens(generate(other, ["hello", [1, 2, 3]])) == expected
    other.shutdown()  # a second time, which does nothing
    with pytest.raises(EngineDeadError, match="shut down"):
        generate(other, "hello")


def test_without_a_tokenizer_token_ids_go_in_and_out(tiny_model: Path):
    with LLM(tiny_model, **FAKE, skip_tokenizer_init=True, disable_frontend_multiprocessing=True) as llm:
        assert len(tokens(generate(llm, [[1, 2, 3]]))[0]) == 5
        for call in (lambda: generate(llm, "text"), llm.get_tokenizer, lambda: llm.chat([])):
            with pytest.raises(RequestError, match="tokenizer"):
                call()


def test_threads_take_turns(llm: LLM):
    prompts = [[1, i] for i in range(4)]
    alone = [tokens(generate(llm, prompt)) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: tokens(generate(llm, prompt)), prompts)) == alone


def test_parameters_that_are_none_are_named(llm: LLM):
    with pytest.raises(RequestError, match="SamplingParams.*'temperature'"):
        generate(llm, "hello", [{"temperature": 0}])


def test_priorities_change_the_order_of_work_and_no_answer(tiny_model: Path):
    prompts = [[i + 1] * 30 for i in range(6)]
    options = {"scheduling_policy": "priority", "max_num_seqs": 2, "num_gpu_blocks_override": 8, "block_size": 32}
    with LLM(tiny_model, **FAKE, **options, disable_frontend_multiprocessing=True) as llm:
        by_priority = generate(llm, prompts, priority=[5, 4, 3, 2, 1, 0])
        ends = [output.metrics.finished_time for output in by_priority]
        assert ends == sorted(ends, reverse=True)
        assert tokens(by_priority) == tokens(generate(llm, prompts))


def test_a_chat_takes_a_priority_for_each_conversation(llm: LLM):
    conversation = [{"role": "user", "content": "hello"}]
    plain = llm.chat([conversation, conversation], PARAMS, use_tqdm=False)
    assert tokens(llm.chat([conversation, conversation], PARAMS, use_tqdm=False, priority=[1, 0])) == tokens(plain)
    with pytest.raises(RequestError, match="2 prompts but 1 priorities"):
        llm.chat([conversation, conversation], PARAMS, use_tqdm=False, priority=[1])


def test_a_sleeping_engine_generates_nothing_and_goes_on_when_woken(tiny_model: Path):
    with LLM(tiny_model, **FAKE, enable_sleep_mode=True, disable_frontend_multiprocessing=True) as sleeper:
        before = tokens(generate(sleeper, "hello"))
        sleeper.sleep(level=1)
        with pytest.raises(RequestError, match="wake_up"):
            generate(sleeper, "hello")
        sleeper.wake_up(tags=["kv_cache"])
        with pytest.raises(RequestError, match="wake_up"):
            generate(sleeper, "hello")
        sleeper.wake_up()
        assert tokens(generate(sleeper, "hello")) == before


def test_an_engine_without_sleep_mode_says_so(llm: LLM):
    with pytest.raises(RequestError, match="--enable-sleep-mode"):
        llm.sleep()
    with pytest.raises(RequestError, match="torch_profiler_dir"):
        llm.start_profile()
