"""What is taken out of a corpus: by keys of content (copies, evaluation sets) and by bounds on text, in any language."""

import argparse
import inspect
import unicodedata
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from samples import image, png, text, words

from moca_core.data.duplicates import WHOLE, CleanRules, find_dropped
from moca_core.data.image_files import ImageBounds
from moca_core.data.keys import MIN_TEXT_CHARACTERS, evaluation_keys, keys_of, pair_key, text_key
from moca_core.data.quality import REASONS, TextBounds, compression, repeated_lines, unwanted
from moca_core.data.schema import DROPPED, evaluation_keys_to_table, keys_to_table
from moca_core.data.validate import valid_documents
from moca_core.types import Document, EvalTask, Query, Rejected, Segment

OFF = CleanRules(duplicates=False, max_image_copies=None, decontaminate=False)
SENTENCE = "Every hole of a board joins two layers of the same net."


def corpus_keys(*parts: list[tuple]) -> pa.Table:
    """KEYS with a column `part` of contents, as steps/clean.py reads them."""
    tables = []
    for part, contents in enumerate(parts):
        table = keys_to_table([Document("s", content) for content in contents], 0)
        tables.append(table.append_column("part", pa.array(np.full(table.num_rows, part, np.int32))))
    return pa.concat_tables(tables)


def none() -> pa.Array:
    return pa.array([], pa.binary(16))


def held_out(task: EvalTask, kind: str = "content") -> pa.Array:
    table = evaluation_keys_to_table(task)
    return table.filter(pc.equal(table["kind"], kind))["key"].combine_chunks()


def places(dropped: pa.Table) -> list[tuple]:
    assert dropped.schema.equals(DROPPED)
    return [(row["part"], row["row"], row["segment"], row["reason"]) for row in dropped.to_pylist()]


def test_a_text_is_the_same_whatever_its_case_spacing_and_composition():
    key = text_key(SENTENCE)
    for other in (
        SENTENCE.upper(),
        SENTENCE.replace(" ", "\n \t"),
        f"  {SENTENCE}\u00a0",
        SENTENCE.replace("E", "\uff25"),
    ):
        assert text_key(other) == key, other
    assert text_key(SENTENCE + " Not") != key and text_key(SENTENCE.replace(" ", "")) != key
    composed = "Die Lötfläche überträgt die Wärme der Größe nach"
    apart = unicodedata.normalize("NFD", composed)
    assert apart != composed
    assert text_key(composed) == text_key(apart) is not None
    assert text_key("x" * MIN_TEXT_CHARACTERS) and text_key("x" * (MIN_TEXT_CHARACTERS - 1) + "   ") is None


def test_keys_of_contents_tell_apart_what_differs():
    board, other = image(60, 60, 1), image(60, 60, 2)
    keys = keys_of((text(SENTENCE), board, other, board))
    assert [place for place, _ in keys.images] == [1, 2, 3] and keys.text is None
    assert keys.images[0][1] == keys.images[2][1] != keys.images[1][1]
    alone = keys_of((text(SENTENCE),))
    assert alone.images == () and alone.text == text_key(SENTENCE) and alone.whole != alone.text
    assert keys_of((text(SENTENCE[:20]), text(SENTENCE[20:]))).whole != alone.whole
    assert (
        evaluation_keys((text("a label"), board)) == [keys.images[0][1]] and evaluation_keys((text("a label"),)) == []
    )
    assert pair_key((text("a"),), (text("b"),)) != pair_key((text("b"),), (text("a"),))
    assert all(len(key) == 16 for key in (keys.whole, alone.text, pair_key((board,), (other,))))


def test_of_copies_the_first_document_stays_in_the_order_of_parts_and_rows():
    a, b, c = ((text(f"{SENTENCE} {n}"), image(60, 60, n)) for n in range(3))
    keys = corpus_keys([a, b, a], [c, b], [a])
    copies = [(0, 2, WHOLE), (1, 1, WHOLE), (2, 0, WHOLE)]
    shuffled = keys.take(pa.array(np.random.default_rng(0).permutation(keys.num_rows)))
    for table in (keys, shuffled):
        dropped = find_dropped(table, none(), CleanRules(max_image_copies=None))
        assert places(dropped) == [(*place, "duplicate_document") for place in copies]
    assert dropped["key"].to_pylist()[0] == keys_of(a).whole
    assert places(find_dropped(keys, none(), OFF)) == []
    assert places(find_dropped(keys.slice(0, 0), none(), CleanRules())) == []


@pytest.mark.parametrize("most", [1, 2, 3, None])
def test_an_image_stays_in_its_first_documents_and_leaves_the_others(most):
    logo = image(60, 60, 7)
    contents = [(text(f"{SENTENCE} {n}"), logo, text(words(5, n)), *([logo] if n == 1 else [])) for n in range(5)]
    keys = corpus_keys(contents[:3], contents[3:])
    all_places = [(0, 0, 1), (0, 1, 1), (0, 1, 3), (0, 2, 1), (1, 0, 1), (1, 1, 1)]
    kept = {1: 1, 2: 3, 3: 4, None: 6}[most]  # a document that has it twice is one document
    dropped = find_dropped(keys, none(), CleanRules(max_image_copies=most))
    assert places(dropped) == [(*place, "image_copies") for place in all_places[kept:]]


def test_what_an_evaluation_set_holds_leaves_the_corpus():
    figure, answer, long = image(60, 60, 3), image(60, 60, 4), text(words(30, 5))
    task = EvalTask(
        "t", (Query((text("which board is that"), figure), (0,)),), ((answer,), (long,), (text("a label"),))
    )
    contents = [
        (text("before"), figure, text("after")),  # loses its image
        (Segment(text=long.text.upper()),),  # is an answer
        (text("a label"),),  # too short to say anything
        (long, image(60, 60, 9)),  # a text beside an image says nothing of the whole
        (answer, answer),
        (text(words(30, 6)),),
    ]
    keys = corpus_keys(contents)
    expected = [
        (0, 0, 1, "image_in_evaluation"),
        (0, 1, WHOLE, "text_in_evaluation"),
        (0, 4, 0, "image_in_evaluation"),
        (0, 4, 1, "image_in_evaluation"),
    ]
    assert places(find_dropped(keys, held_out(task), CleanRules())) == expected
    assert places(find_dropped(keys, held_out(task), replace(CleanRules(), decontaminate=False))) == []
    pairs = held_out(task, "pair")
    assert pairs.to_pylist() == [pair_key(task.queries[0].content, task.candidates[0])]
    assert places(find_dropped(keys, pairs, CleanRules())) == []


def test_a_place_goes_once_with_the_first_of_its_reasons():
    figure, long = image(60, 60, 3), (text(words(30, 5)),)
    task = EvalTask("t", (Query((figure,), (0,)),), (long,))
    keys = corpus_keys([long, long, (figure, text("a")), (figure, text("b"))])
    assert places(find_dropped(keys, held_out(task), CleanRules(max_image_copies=1))) == [
        (0, 0, WHOLE, "text_in_evaluation"),
        (0, 1, WHOLE, "text_in_evaluation"),
        (0, 2, 0, "image_in_evaluation"),
        (0, 3, 0, "image_in_evaluation"),
    ]


@pytest.mark.parametrize("ranges", [2, 3, 7])
def test_what_goes_does_not_depend_on_how_keys_are_shared_out(ranges):
    rng = np.random.default_rng(1)
    contents = []
    for count in rng.integers(0, 3, 120):
        images = [image(56, 56, int(n)) for n in rng.integers(0, 12, count)]
        contents.append((*images, text(words(12, int(rng.integers(0, 25))))))
    keys = corpus_keys(contents[:50], contents[50:90], contents[90:])
    task = EvalTask("t", (Query((image(56, 56, 3),), (0,)),), ((text(words(12, 4)),),))
    rules = CleanRules(max_image_copies=4)
    whole = find_dropped(keys, held_out(task), rules)
    first = np.frombuffer(b"".join(keys["key"].to_pylist()), dtype=">u8")[::2]
    ranged = [find_dropped(keys.filter(pa.array(first % ranges == n)), held_out(task), rules) for n in range(ranges)]
    assert {*whole["reason"].to_pylist()} == {
        "image_in_evaluation",
        "text_in_evaluation",
        "duplicate_document",
        "image_copies",
    }
    seen = {place[:3] for dropped in ranged for place in places(dropped)}
    assert seen == {place[:3] for place in places(whole)} and all(dropped.num_rows for dropped in ranged)


def test_rules_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="max_image_copies=0 must be at least 1, or null"):
        CleanRules(max_image_copies=0)
    for name, value in (("min_characters", 0), ("max_characters", 0), ("max_compression", 0.5)):
        with pytest.raises(ValueError, match=f"{name}={value} must be at least 1, or null"):
            TextBounds(**{name: value})
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"max_repeated_lines={share} must be between 0 and 1"):
            TextBounds(max_repeated_lines=share)


VOCABULARY = {
    "chinese": "电路 板子 铜层 连接 元件 焊盘 设计 规则 检查 编辑 原理图 网络 电源 接地 电阻 电容 走线 宽度 孔径 "
    "制造 文件 导出 库 符号 封装 层叠 阻抗 信号 时钟 "
    "测量 温度 散热 厚度 间距 误差 打开 保存 选择 移动 旋转 删除 复制 显示 隐藏 颜色 单位 坐标 窗口 菜单 按钮",
    "arabic": "لوحة دائرة نحاس طبقة ثقب مكون قاعدة تصميم فحص محرر شبكة طاقة أرضي مقاومة مكثف مسار عرض قطر تصنيع ملف تصدير مكتبة رمز غلاف "
    "إشارة ساعة قياس حرارة سمك مسافة خطأ فتح حفظ اختيار نقل تدوير حذف نسخ إظهار إخفاء لون وحدة نافذة قائمة زر",
    "thai": "แผงวงจร ทองแดง ชั้น รู ชิ้นส่วน กฎ การออกแบบ ตรวจสอบ ตัวแก้ไข เครือข่าย พลังงาน กราวด์ ตัวต้านทาน ตัวเก็บประจุ ลายทองแดง ความกว้าง "
    "ผลิต ไฟล์ ส่งออก คลัง สัญลักษณ์ สัญญาณ นาฬิกา วัด อุณหภูมิ ความหนา ระยะห่าง เปิด บันทึก เลือก ย้าย หมุน ลบ คัดลอก แสดง ซ่อน สี หน่วย",
    "english": " ".join(sorted({*words(200).split()})),
}


def prose(language: str, characters: int = 4000) -> str:
    """More monotonous than what people write: a few dozen words at random. Chinese and Thai stand without spaces."""
    rng, vocabulary, paragraphs = np.random.default_rng(0), VOCABULARY[language].split(), []
    space, stop = {"chinese": ("", "。"), "thai": ("", " ")}.get(language, (" ", ". "))
    while sum(map(len, paragraphs)) < characters:
        sentences = [space.join(rng.choice(vocabulary, rng.integers(4, 12))) for _ in range(5)]
        paragraphs.append(stop.join(sentences))
    return "\n".join(paragraphs)


TEXTS = {language: prose(language) for language in VOCABULARY} | {
    "code": inspect.getsource(argparse),
    "table": "\n".join(f"| {n} | R{n} | {n * 47 % 1000} Ohm | 0603 | {n % 7} |" for n in range(200)),
    "long line": prose("english").replace("\n", " "),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_of_any_language_passes(kind):
    assert len(TEXTS[kind]) > 1000
    assert unwanted((text(TEXTS[kind]),), TextBounds(), "w") is None
    halves = TEXTS[kind][:700], TEXTS[kind][700:]
    assert unwanted((text(halves[0]), image(60, 60), text(halves[1])), TextBounds(), "w") is None


@pytest.mark.parametrize("kind", ["chinese", "arabic", "thai", "english", "code"])
def test_text_that_says_the_same_again_is_not_wanted(kind):
    line = TEXTS[kind].replace("\n", " ")[:40]
    again = unwanted((text(f"{line}\n" * 60),), TextBounds(), "file row 3")
    assert (again.reason, again.where) == ("repeated_lines", "file row 3") and "98% of the characters" in again.detail
    run = unwanted((text(line * 100),), TextBounds(), "w")
    assert run.reason == "repetitive_text" and "compresses" in run.detail
    assert unwanted((text((line + "\n") * 60),), TextBounds(max_repeated_lines=None), "w").reason == "repetitive_text"
    off = TextBounds(None, None, None, None)
    assert unwanted((text(line * 100),), off, "w") is None and unwanted((text("x"),), off, "w") is None
    assert unwanted((text(f"{line}\n" * 3),), TextBounds(), "w") is None  # a short list


def test_length_is_bounded_from_both_sides_and_an_image_needs_no_text():
    bounds = TextBounds(min_characters=10, max_characters=50)
    reasons = [getattr(unwanted((text("x" * n),), bounds, "w"), "reason", None) for n in (9, 10, 50, 51)]
    assert reasons == ["text_too_short", None, None, "text_too_long"]
    assert unwanted((text("a"), image(60, 60)), bounds, "w") is None and unwanted((image(60, 60),), bounds, "w") is None
    assert unwanted((text("x" * 30), image(60, 60), text("x" * 30)), bounds, "w").reason == "text_too_long"


def test_measures_of_repetition():
    assert repeated_lines("aa\n  aa \nbbb\n\n\n") == pytest.approx(2 / 7) and repeated_lines("") == 0
    assert compression("ab" * 5000) > 50 and compression(TEXTS["english"]) < 6
    assert compression("汉" * 10**6) > 50
    assert compression(prose("english", 70_000) + "x" * 10**6) < 6  # of the beginning alone


GOOD, BAD, MISSING = png(60, 60), b"no image", b""


def test_a_document_may_go_on_without_its_bad_images():
    long = Segment(text=SENTENCE)
    given = [
        Rejected("before", "d", "w 0"),
        Document("s", (long, Segment(image=GOOD), Segment(image=BAD), Segment(image=MISSING)), "w 1"),
        Document("s", (Segment(image=BAD), Segment(text=" ")), "w 2"),
        Document("s", (Segment(text="short"), Segment(image=BAD)), "w 3"),
        Document("s", (Segment(text="short"), Segment(image=GOOD)), "w 4"),
    ]
    kept = list(valid_documents(given, ImageBounds(), text_bounds=TextBounds(), drop_images=True))
    documents = [item for item in kept if isinstance(item, Document)]
    assert [d.content for d in documents] == [(long, Segment(image=GOOD)), given[4].content]
    assert [d.where for d in documents] == ["w 1", "w 4"]
    assert [(r.reason, r.where) for r in kept if isinstance(r, Rejected)] == [
        ("before", "w 0"),
        ("dropped_not_an_image", "w 1 segment 2"),
        ("dropped_image_missing", "w 1 segment 3"),
        ("dropped_not_an_image", "w 2 segment 0"),
        ("empty", "w 2"),
        ("dropped_not_an_image", "w 3 segment 1"),
        ("text_too_short", "w 3"),
    ]
    whole = list(valid_documents(given, ImageBounds(), text_bounds=TextBounds()))
    assert [getattr(item, "reason", None) for item in whole] == ["before", *["not_an_image"] * 3, None]
    assert whole[4] == given[4] and {*REASONS} >= {"text_too_short"}
