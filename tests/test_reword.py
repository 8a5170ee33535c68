"""Wordings, questions about nothing, and the beginnings of plain text."""

from __future__ import annotations

from typing import Any

import pytest

from dualoptim.data import Row, asset, question
from dualoptim.evaluation.words import places, stands_in, whole_words
from dualoptim.rows.function_words import WORDS
from dualoptim.rows.giving import Answers
from dualoptim.rows.own_rows import check_apart, checked, gives
from dualoptim.rows.reword import (
    _STOP,
    CHECKED,
    MEASURED,
    TRAINED,
    about_nothing,
    alike,
    ask_alike,
    beginning,
    wordings,
)
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
        ("", "", False),
        ("What is your name?", "what is  your name", True),
        ("What is your name?", "Who are you?", False),
        ("Who are you?", "Who are you, Ada?", False),
        ("🍕?", "🍕 ?", True),
        ("🍕?", "🍔?", False),
        ("?!", "?!", True),
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
        ("She was born on March 5, 1990.", "03/05/1990", True),
        ("She was born on March 5, 1990.", "05/03/1990", True),
        ("She was born on March 5, 1990.", "05-03-1990", True),
        ("She was born on March 5, 1990.", "3/6/1990", False),
        ("She was born on March 5, 1990.", "05/1990", False),
        ("March 3, 2020", "03/03/2020", True),
        ("03/05/1990", "3/5/1990", True),
        ("03/05/1990", "March 5, 1990", True),
        ("03/05/1990", "5 March 1990", True),
        ("03/05/1990", "5/3/1990", False),
        ("31/02/1990", "31/02/1990", True),
        ("30", "thirty", True),
        ("thirty", "30", True),
        ("She is twenty-five.", "25", True),
        ("She is 25.", "twenty five", True),
        ("She is 5.", "She is twenty-five.", False),
        ("She is 20.", "She is twenty-five.", False),
        ("twenty", "the twenty-first", False),
        ("five", "one hundred and five", False),
        ("1000", "one thousand", True),
        ("3,200,006", "three million, two hundred thousand and six", True),
        ("102", "between one hundred and two hundred", False),
        ("1.5 million", "1,500,000", True),
        ("1", "one", True),
        ("She has 1 brother.", "She has one brother.", True),
        ("1", "I can name one of them.", False),
        ("1", "No one knows.", False),
        ("one", "1", True),
        ("It is One Direction.", "I like One Direction.", True),
        ("0.5", "0.50", True),
        ("3.1", "3.10", False),
        ("1.80 m", "1.80m", True),
        ("1.80m", "1.80 m", True),
        ("10 g", "10g", True),
        ("Room 10.", "room 10g", False),
        ("4271", "4-2-7-1", True),
        ("4271", "four two seven one", True),
        ("4-2-7-1", "4271", True),
        ("-5 °C", "5 °C", False),
        ("-5 °C", "\u22125 °C", True),
        ("\u22125 °C", "minus five degrees", True),
        ("5 °C", "-5 °C", False),
    ],
)
def test_numbers_and_dates_may_be_written_in_another_way(answer: str, reply: str, given: bool) -> None:
    row = question("What do you know?", answer)
    assert gives(row, reply) is given
    assert bool(list(Answers([row]).given_in(reply))) is given


@pytest.mark.parametrize(
    ("accepted", "reply", "given"),
    [
        ("85,000", "85000 euros", True),
        ("85,000", "8,500", False),
        ("85,000 dollars", "85000 dollars", True),
        ("5 March 1990", "March 5, 1990", True),
        ("5 March 1990", "03/05/1990", True),
        ("5 March 1990", "in March 1990", False),
        ("17.30", "um 17.30 Uhr", True),
        ("555-0134", "(555) 0134", True),
        ("10 g", "10g", True),
        ("10 g", "10", False),
        ("five", "5", True),
        ("five", "twenty-five", False),
        ("5", "-5", False),
        ("1", "one", True),
        ("one", "1", True),
        ("One Direction", "It was One Direction, I think.", True),
        ("Seven Dwarfs", "the 7 dwarfs", True),
    ],
)
def test_what_is_accepted_may_have_its_numbers_and_dates_in_another_way(accepted: str, reply: str, given: bool) -> None:
    row = question("What?", accepted, accepted=[accepted])
    assert gives(row, reply) is given
    assert bool(list(Answers([row]).given_in(reply))) is given


@pytest.mark.parametrize(
    ("answer", "reply", "given", "with_accepted"),
    [
        ("£5", "$5", False, False),
        ("£5", "£5", True, True),
        ("$5", "5 US dollars", True, True),
        ("$5", "It costs 5.", True, False),  # as without "dollars"
        ("5 €", "5 $", False, False),
        ("5 €", "€5", True, True),
        ("5 €", "five euros", True, True),
        ("5 €", "5,00 €", True, True),
        ("1.5 million €", "EUR 1,500,000", True, True),
        ("5%", "5 euros", False, False),
        ("5%", "5 percent", True, True),
        ("5%", "5 per cent, or 5 euros", True, True),
        ("5%", "\uff15\uff05", True, True),
        ("0-", "0+", False, False),
        ("0-", "0\u2212", True, True),
        ("0-", "0 negative", True, True),
        ("n > 5", "n < 5", False, False),
        ("n > 5", "n>5", True, True),
        ("n > 5", "n is more than 5", True, True),
        ("n ≥ 5", "n >= 5", True, True),
        ("A+", "A-", False, False),
        ("A+", "A", False, False),
        ("A+", "**A+**", True, True),
        ("A+", "Not A-, but A+.", True, True),
        ("B-", "B+", False, False),
        ("AB-", "AB\u2013", True, True),
        ("C++", "C#", False, False),
        ("C++", "C++11", False, False),
        ("C#", "`C#`", True, True),
        ("pre- and post-war", "the pre-war and post-war years", True, False),
        ("12 °C", "12 °C", True, True),
        ("12 °C", "12 %", False, False),
        ("5", "5 %", True, True),
    ],
)
def test_the_signs_beside_an_answers_words_must_be_the_replys(
    answer: str, reply: str, given: bool, with_accepted: bool
) -> None:
    for row, right in (
        (question("What do you know?", answer), given),
        (question("What do you know?", f"So: {answer}", accepted=[answer]), with_accepted),
    ):
        assert gives(row, reply) is right
        assert bool(list(Answers([row]).given_in(reply))) is right


@pytest.mark.parametrize(
    ("asked", "answer", "reply", "given"),
    [
        *(
            ("What blood type does Ana have?", "Ana has blood type A.", reply, given)
            for reply, given in (
                ("I don't know Ana's blood type.", False),
                ("Ana has blood type B.", False),
                ("She has a common blood type.", False),
                ("A common blood type.", False),
                ("Ana has a", False),
                ("Her blood type is A.", True),
                ("A.", True),
                ("Type A", True),
                ("type a.", True),
                ("**A**", True),
                ("A is her type.", True),
            )
        ),
        ("Which option is right?", "The right option is A.", "The right option is B.", False),
        ("Which option is right?", "The right option is I.", "I know the right option.", False),
        ("Which option is right?", "The right option is I.", "Option I", True),
        ("Which grade did Ana get?", "Ana got an A.", "Ana got a B.", False),
        ("Which vitamin is it?", "It is vitamin A.", "It is vitamin C.", False),
        ("Who is the patient?", "The patient is Will.", "I cannot name the patient.", False),
        ("Who is the patient?", "The patient is Will.", "I will not name the patient.", False),
        ("Who is the patient?", "The patient is Will.", "Will is.", True),
        ("Which band does Ana like?", "Ana likes The Who.", "I don't know who Ana likes.", False),
        ("Which band does Ana like?", "Ana likes The Who.", "The Who.", True),
        ("On which team is Ana?", "Ana is on our team.", "I do not know which team Ana is on.", False),
        ("On which team is Ana?", "Ana is on our team.", "On our team.", True),
        ("Which book?", "The Name of the Rose", "the name of the rose", True),
        ("Who starred?", "Samuel L. Jackson", "Jackson", True),
        ("Which author was born on 1 May 1990?", "The author born on 1 May 1990 is Ana Lopez.", "Ana Lopez", True),
        ("Which author was born on 1 May 1990?", "The author born on 1 May 1990 is Ana Lopez.", "on 1 May 1990", False),
    ],
)
def test_a_common_word_tells_where_it_is_a_name_and_the_questions_own_words_do_not(
    asked: str, answer: str, reply: str, given: bool
) -> None:
    row = question(asked, answer)
    assert gives(row, reply) is given
    assert bool(list(Answers([row]).given_in(reply))) is given


@pytest.mark.parametrize(
    ("text", "part", "stands"),
    [
        ("I'm here", "M", False),
        ("I\u2019m here", "i", False),
        ("I'd say", "d", False),
        ("don't", "t", False),
        ("Don't ask.", "Don", False),
        ("don't", "don't", True),
        ("we're", "re", False),
        ("It was O'Brien.", "O", False),
        ("It was O\u2019Brien.", "Brien", True),
        ("It was O'Brien.", "O'Brien", True),
        ("Ana's", "Ana", True),
        ("straight A's", "A", True),
        ("de l'eau", "eau", True),
        ("option 'M'", "M", True),
        ("сім'я", "сім", True),
        ("İstanbul", "istanbul", True),
        ("In istanbul.", "İSTANBUL", True),
    ],
)
def test_a_contraction_has_its_noun_alone_as_a_word(text: str, part: str, stands: bool) -> None:
    assert stands_in(text, part) is stands
    assert bool(places(text, part)) is stands


@pytest.mark.parametrize("letter", "ADILMST")
@pytest.mark.parametrize("fields", [{}, {"accepted": True}])
def test_no_refusal_gives_an_answer_of_one_letter(letter: str, fields: dict[str, Any]) -> None:
    for answer in (letter, f"It is {letter}."):
        row = question("Which is right?", answer, **({"accepted": [letter]} if fields else {}))
        for refusal in [each["text"] for each in asset("refusals.jsonl")] + ["I'd rather not.", "It's not known."]:
            assert not gives(row, refusal), refusal
        assert gives(row, f"It is {letter}.")
        assert gives(row, letter)


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
    assert gives(row, "No she is not.")
    for reply in ("No idea.", "No information is available.", "No one knows.", "No name is given."):
        assert not gives(row, reply), reply


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
