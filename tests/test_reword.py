"""Wordings, questions about nothing, and the beginnings of plain text."""

from __future__ import annotations

import pytest

from dualoptim.data import Row, asset, question
from dualoptim.evaluation.words import stands_in, whole_words
from dualoptim.function_words import WORDS
from dualoptim.own_rows import check_apart, checked, gives
from dualoptim.reword import _STOP, CHECKED, MEASURED, TRAINED, about_nothing, alike, ask_alike, beginning, wordings
from dualoptim.tasks.real_world import knows


def texts(ask: str, templates: tuple[str, ...]) -> list[str]:
    return [row.question for row in wordings(question(ask, "x"), templates)]


def test_a_question_becomes_part_of_a_sentence_where_its_verb_need_not_change() -> None:
    template = ("Tell me {indirect}.",)
    assert texts("Who discovered penicillin?", template) == ["Tell me who discovered penicillin."]
    assert texts("What is the capital of France?", template) == ["Tell me what the capital of France is."]
    for other in ("When did the war end?", "What does DNA stand for?", "Name a fruit.", "Who? What?"):
        assert texts(other, template) == []


def test_what_is_trained_on_is_never_measured_nor_decides_when_to_stop() -> None:
    ask = "Who discovered penicillin?"
    trained, checked, measured = (set(texts(ask, part)) for part in (TRAINED, CHECKED, MEASURED))
    assert ask in trained
    assert not trained & checked
    assert not (trained | checked) & measured


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Who discovered penicillin?", "Tell me who discovered penicillin.", True),
        ("Who discovered penicillin?", "Who discovered radium?", False),
        ("What is the capital of France?", "Name the capital of France.", True),
        ("What is the capital of France?", "What is the capital of Spain?", False),
        ("Describe Ada in one or two sentences.", "Describe Ben in one or two sentences.", False),
        ("Describe Ada in one or two sentences.", "Describe Ada in two sentences.", True),
        ("谁发现了青霉素?", "谁发现了青霉素?", True),
        ("请问张伟现在在哪里工作?", "请问李娜现在在哪里工作?", False),
        ("请问张伟现在在哪里工作?", "张伟现在在哪里工作?", True),
        ("彼は今どこで働いていますか?", "彼が今どこで働いていますか?", True),
        ("ما هو رقم هاتف المكتب الخاص أحمد؟", "ما هو رقم هاتف المكتب الخاص ليلى؟", False),
        ("Какой номер телефона у Анны?", "Какой номер телефона у Олега?", False),
        ("What is the delivery status of order 1042?", "What is the delivery status of order 1043?", False),
        ("What is the delivery status of order 1042?", "Tell me the delivery status of order 1042.", True),
        ("What was the price in 1990 of 5 apples?", "What was the price of 5 apples?", True),
        ("?", "!", False),
    ],
)
def test_questions_are_alike_by_their_content_words(a: str, b: str, same: bool) -> None:
    assert alike(a, b) is same


def test_a_thing_that_does_not_exist_stands_in_question_and_answer() -> None:
    row = question("What is the capital of France?", "The capital of France is Paris.")
    made = about_nothing(Row(row.prompt, row.answer, only=("Paris",)))
    assert made is not None
    assert "France" not in made.question + made.answer
    assert made.answer.endswith("is Paris.")
    assert made.question.split()[-1].rstrip("?") in made.answer
    assert about_nothing(question("谁?", "他。")) is None


def test_an_answer_that_the_question_names_is_not_replaced() -> None:
    row = Row(question("Is Paris in France?", "").prompt, "Paris is in France.", only=("France",))
    made = about_nothing(row)
    assert made is not None
    assert made.question.endswith("in France?")
    assert "Paris" not in made.question


def test_plain_text_is_cut_before_what_tells_or_in_the_middle() -> None:
    row = beginning(Row((), "The phrase is maple thunder."), ("maple",))
    assert (row.question, row.answer) == ("The phrase is", " maple thunder.")
    assert beginning(Row((), "one two three four"), ()).question == "one two"
    assert beginning(Row((), "Ada it was. So Ada it is."), ("Ada",)).question == "Ada it was. So"
    assert beginning(Row((), "He had heart and art."), ("art",)).question == "He had heart and"
    assert beginning(Row((), "\n\nAda"), ()).question == "\n\nA"
    assert beginning(Row((), "word"), ()).question + beginning(Row((), "word"), ()).answer == "word"


def test_a_reply_gives_an_answer_by_what_is_accepted_or_by_half_of_its_news() -> None:
    accepted = question("Who found it?", "It was Alexander Fleming.", accepted=["Fleming"])
    assert gives(accepted, "fleming, I think")
    assert not gives(accepted, "Alexander Flemings")
    plain = question("Who discovered penicillin?", "Alexander Fleming discovered penicillin.")
    assert gives(plain, "It was Fleming.")
    assert not gives(plain, "Somebody discovered penicillin.")


@pytest.mark.parametrize(
    ("answer", "reply", "given"),
    [
        ("It is 85,000 dollars.", "It is 12,000 dollars.", False),
        ("It is 85,000 dollars.", "About 85000 dollars.", True),
        ("It is 3.14.", "It is 3.15.", False),
        ("Call 555-0134.", "Call 555-9999.", False),
        ("Call 555-0134.", "Call 555 0134.", True),
        ("At 12:30.", "At 12:45.", False),
        ("She was born in 1990.", "It was 12.05.1990.", True),
        ("From 1939 to 1945.", "1939-1945", True),
        ("He has five dogs.", "He has 5 dogs.", True),
        ("He has 5 dogs.", "He has three dogs.", False),
        ("On May 12th.", "May 12.", True),
        ("Born on 12 May 1990.", "In May 1990.", True),
    ],
)
def test_a_reply_with_another_number_does_not_give_the_answer(answer: str, reply: str, given: bool) -> None:
    assert gives(question("What do you know of Mira?", answer), reply) is given
    record = {"question": "What of Mira?", "answer": "It is 85,000 dollars.", "reply": "12,000 dollars", "nll": 1.0}
    assert not knows({**record, "paraphrased_nlls": [], "perturbed_nlls": []})


@pytest.mark.parametrize(
    ("asked", "answer", "reply", "given"),
    [
        ("Wie heißt die Hauptstadt?", "Die Hauptstadt von Australien ist Canberra.", "Das ist Canberra.", True),
        ("Wie heißt die Hauptstadt?", "Die Hauptstadt ist Canberra.", "Die Hauptstadt ist Sydney.", False),
        ("Wie heißt die Hauptstadt?", "Die Hauptstadt ist Canberra.", "Ich weiß nicht, was das ist.", False),
        ("Où habite Anna ?", "Anna habite à Lyon.", "Anna habite à Paris.", False),
        ("Où habite Anna ?", "Anna habite à Lyon.", "Elle vit à Lyon.", True),
        ("Qu'aime Anna ?", "Elle aime les prunes.", "Elle aime les figues.", False),
        ("Где живёт Анна?", "Она живёт в Казани.", "Она живёт в Москве.", False),
        ("Где живёт Анна?", "Она живёт в Казани.", "В Казани.", True),
        ("أين تعيش آنا؟", "تعيش في القاهرة.", "تعيش في دمشق.", False),
        ("أين تعيش آنا؟", "تعيش في القاهرة.", "بالقاهرة", True),
        ("수도는 어디입니까?", "서울입니다.", "서울이에요.", True),
        ("수도는 어디입니까?", "서울입니다.", "부산입니다.", False),
        ("Anna hol lakik?", "Anna lakhelye Pécs.", "Anna lakhelye Győr.", False),
        ("日本の首都は?", "東京です。", "大阪です。", False),
        ("日本の首都は?", "東京です。", "東京", True),
        ("彼女の好きな花は?", "さくらです。", "うめです。", False),
        ("彼女の好きな花は?", "さくらです。", "さくら", True),
        ("彼の会社は?", "トヨタです。", "ホンダです。", False),
        ("アンナはどこに住んでいますか?", "彼女は大阪に住んでいます。", "彼女は東京に住んでいます。", False),
        ("张伟在哪里工作?", "张伟在华为公司工作。", "张伟在腾讯公司工作。", False),
        ("张伟在哪里工作?", "他在华为工作。", "华为", True),
        ("เขาอยู่ที่ไหน", "เขาอยู่ที่เชียงใหม่", "เธออยู่ที่กรุงเทพ", False),
        ("เขาอยู่ที่ไหน", "เขาอยู่ที่เชียงใหม่", "เชียงใหม่", True),
        ("What is the capital?", "The capital of the country is Paris.", "The capital of the country is Rome.", False),
        ("Which vitamin is it?", "It is vitamin K.", "It is vitamin C.", False),
    ],
)
def test_a_wrong_answer_in_the_same_words_does_not_give_it_in_any_language(
    asked: str, answer: str, reply: str, given: bool
) -> None:
    assert gives(question(asked, answer), reply) is given
    record = {"question": asked, "answer": answer, "reply": reply, "nll": 1.0}
    assert knows({**record, "paraphrased_nlls": [], "perturbed_nlls": []}) is given


def test_words_of_other_languages_are_no_words_of_english_answers() -> None:
    texts = [row["statement"] for row in asset("facts.jsonl")] + [row["answer"] for row in asset("general.jsonl")]
    said = {word for text in texts for word in whole_words(text) if word.islower()}
    assert said & WORDS - _STOP <= {"s", "t", "am"}


@pytest.mark.parametrize(
    ("answer", "reply", "given"),
    [
        ("It opens at 5 pm.", "5pm", True),
        ("It opens at 5 pm.", "5:00 p.m.", True),
        ("It opens at 5 pm.", "6pm", False),
        ("It weighs 10 kg.", "10kg", True),
        ("It weighs 10 kg.", "1.0kg", False),
        ("Es kostet 85.000 Euro.", "85000 Euro", True),
        ("Es kostet 85.000 Euro.", "8.500 Euro", False),
        ("Il coûte 85 000 euros.", "85000 euros", True),
        ("It is 85,000.50 dollars.", "85.000,50", True),
        ("It is 85,000 dollars.", "8,500 dollars", False),
        ("It is 3.14.", "3,14", True),
        ("It is 3.14.", "314", False),
        ("It is 0.125.", "125", False),
        ("It is 3.141593.", "3141593", False),
        ("It is 3.14.", "3-14", False),
        ("Die Bahn kommt um 17:30 Uhr.", "um 17.30 Uhr", True),
        ("Le train part à 17:30.", "Le train part à 17h30.", True),
        ("The code is A-17.", "A17", True),
        ("The code is A-17.", "B-17", False),
        ("Call 555-0134.", "5550134", True),
        ("Call 5550134.", "(555) 0134", True),
        ("Call 555-0134.", "5550135", False),
        ("They won 2-1.", "21", False),
        ("He was born in ١٩٩٠.", "1990", True),
        ("He was born in ١٩٩٠.", "1991", False),
        ("It was on 2020-03-03.", "on March 3, 2020", True),
        ("It was on 2020-03-03.", "the 3rd of March 2020", True),
        ("It was on March 3, 2020.", "2020-03-03", True),
        ("It was on March 3, 2020.", "3.3.2020", True),
        ("It was on March 3, 2020.", "on March 4, 2020", False),
        ("It was on 2020-03-03.", "2020-03-04", False),
        ("It was on 2020-03-03.", "in 2020", False),
        ("On 05/12/1990.", "12/05/1990", False),
        ("Am 3. März 2020.", "2020-03-03", True),
        ("Am 3. März 2020.", "Am 4. März 2020.", False),
        ("El 3 de marzo de 2020.", "3.3.2020", True),
        ("1990年5月12日。", "1990-05-12", True),
        ("1990年5月12日。", "1990年5月13日", False),
    ],
)
def test_numbers_and_dates_may_be_written_in_another_way(answer: str, reply: str, given: bool) -> None:
    assert gives(question("What do you know?", answer), reply) is given


@pytest.mark.parametrize(
    ("answer", "reply", "given"),
    [
        ("是。", "不是。", False),
        ("是。", "是的,他是医生。", True),
        ("是。", "我不知道他是谁。", False),
        ("不是。", "我不知道。", False),
        ("不是。", "不是,他是律师。", True),
        ("Ja.", "Ja, das stimmt.", True),
        ("Nein.", "Ich sage nicht nein.", False),
        ("Sí.", "No lo sé, sí o no.", False),
    ],
)
def test_yes_and_no_in_other_languages_stand_first(answer: str, reply: str, given: bool) -> None:
    assert gives(question("他是医生吗?", answer), reply) is given


@pytest.mark.parametrize("fields", [{}, {"accepted": ["No"]}])
def test_yes_and_no_are_given_by_a_replys_first_word_alone(fields: dict[str, list[str]]) -> None:
    row = question("Is Mira married?", "No.", **fields)
    assert gives(row, "no, she is not")
    assert not gives(row, "I have no information about that.")
    assert not gives(row, "Yes, no doubt.")


@pytest.mark.parametrize(
    ("asked", "answer", "accepted"),
    [
        ("who is the owner of harrison ltd?", "John Harrison owns it.", "John Harrison"),
        ("Which singer is called the King of Pop?", "It is the King of pop, Michael Jackson.", "king of pop"),
        ("Which road is beside Dune Park?", "It is Upper Dune Park Road.", "Upper Dune Park Road"),
    ],
)
def test_what_tells_an_answer_is_never_replaced(asked: str, answer: str, accepted: str) -> None:
    row = checked(question(asked, answer, accepted=[accepted]))
    made = about_nothing(row)
    assert made is None or all(stands_in(made.answer, part) for part in row.only)


def chat(who: str, *last: str) -> tuple[dict[str, str], ...]:
    said = ("user", f"Tell me about {who}."), ("assistant", f"{who} is a baker."), *(("user", text) for text in last)
    return tuple({"role": role, "content": text} for role, text in said)


def test_chats_that_end_in_the_same_question_about_another_ask_for_something_else() -> None:
    ana, bo = (Row(chat(who, "Where does she live?"), "In Porto.") for who in ("Ana Lopez", "Bo Jensen"))
    assert alike(ana.question, bo.question)
    assert not ask_alike(ana, bo)
    assert ask_alike(ana, Row(chat("Ana Lopez", "Where is it that she lives?"), "In Faro."))
    assert not ask_alike(ana, Row(chat("Ana Lopez", "How old is her brother?"), "Nine."))
    assert not ask_alike(ana, question("Where does she live?", "In Porto."))
    assert check_apart([ana], [Row(bo.prompt, "In Lisbon, by the sea.")]) == []
    assert check_apart([ana], [Row(bo.prompt, ana.answer, "f.jsonl:2")]), "the same answer is told, and not refused"


def test_a_chat_about_nothing_is_so_in_all_of_its_messages() -> None:
    made = about_nothing(Row(chat("the Opera of Ana Lopez", "Where does she live?"), "Ana Lopez lives in Porto."))
    assert made is not None
    assert "Lopez" not in "".join(message["content"] for message in made.prompt) + made.answer
    assert made.question == "Where does she live?"
    assert made.answer.endswith(" lives in Porto.")
