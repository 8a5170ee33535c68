"""Words that carry no answer, such as pronouns, articles and prepositions, in languages other than English; yes and no.

Left out are words that mean something in English, such as die, hat, man, war, son, era, and single Latin letters, of
which many are answers (vitamin K).
"""

from __future__ import annotations

from ..evaluation.words import folded

WORDS = frozenset(
    folded(
        """
        am aus bei bis das dass dein dem der des du ein eine einem einen einer eines er es euch euer für haben
        hatte hier ich ihm ihn ihnen ihr ihre im ist ja kein keine mein mich mir nach nicht noch nur ob oder
        sein seine seit sich sie sind um und uns unser vom von vor waren wenn wer wie wir wird wo wurde während
        zu zum zur zwischen über auch auf wann warum welche welcher welches heißt heisst

        à au aux avec ce ces cet cette chez dans de des du elle elles en est et il ils je la le les leur leurs
        lui ma mais mes moi mon ne nos notre nous où ou pas qu quand que quel quelle quels quelles qui sa se ses
        sont sur ta te tes toi tu un une vos votre vous été était j l n s t

        al como con cual cuál cuándo cuando de del donde dónde el ella ellas ellos en entre es esa ese eso esta
        este esto está fue ha han la las le les lo los mi mis muy nos para pero por porque que qué quién quien
        se ser sobre su sus también te tiene tu tus un una uno unos yo é

        ao aos as com da das do ela elas ele eles em esta este está foi isso isto já mais mas me meu minha nas
        nos não os ou pela pelo para por qual quando que quem se seu seus sua suas são também tem um uma você

        agli alla alle allo anche che chi ci da dai dal dalla dei del della delle dello di dov gli ha hanno ho
        il in io la le lo loro lui ma mi mio nel nella nelle nello noi non nostro per perché più quale quando
        quanto quella quello questa questo sei sia siamo sono sua sul sulla suo te ti tra tu un una uno voi è

        aan als bij dat de deze die dit een en er haar heb hebben heeft het hij ik in is je jij kan maar mij
        mijn naar niet nog nu of om onder ons onze ook op te tot uit voor waar wat werd wie wij wordt ze zich
        zij zijn zo zou

        att av det dette detta där deras dess du ej en er et ett från för han har hennes hon hur hvad hvem hvor
        ikke inte jeg kan med mig min mitt nej når och og om på sig sin sitt skal som till til upp vad var vem
        vi vid vil är över af at

        co czy do dla gdzie ich ja jak jego jej jest kiedy kto która które który mnie może nad nie od ona oni
        ono po przez przy są się ta tak także tam te to ty we za ze że był była było

        ani bez by byl byla co do je jeho jej její jeji jsem jsou já kde kdo kdy který která které má ne od on
        ona oni po pro při s se tak to tu ty ve za že

        az egy és hogy ki hol mi nem volt mikor ez azt meg

        ja on ei se hän ovat oli että missä kuka mikä

        și este în la de pe din unde cine un el ea ei sunt nu

        bir bu da de değil en için ile ki mi nasıl ne nerede ona onu onun ve çok şu mı

        di dan ini itu ia ke dari untuk dengan pada adalah mana siapa saya kamu mereka

        là và của ở tại trong có cho anh cô ấy ông bà không được đâu gì một các những

        и в во не что он на я с со как а то все она так его но да ты к у же вы за бы по ее её мне было от меня о
        из ему это этот эта эти для мы их чем была был были есть где кто когда какой какая какое какие или ли до
        ни при над під та і й що це він вона вони його її їх де хто коли який яка яке які з зі із від є

        του της το τα οι ο η τον την των στο στη στην στον και είναι με για από που πού ποιος ποια τι να θα δεν
        μου σε ένα μια ένας

        في من على إلى عن مع هو هي هم هن أنا نحن أنت هذا هذه ذلك تلك التي الذي ما لا لم لن كان كانت قد و أو ثم أن
        إن أين متى كيف هل بين عند له لها

        של את על הוא היא הם הן אני אתה אנחנו זה זו זאת לא עם אל מן כי גם או אם איפה מי מה מתי איך היה הייתה יש
        אין

        در از به با که این آن را است و او من ما شما برای هم بود کجا چه کی می

        में का की के को से है हैं था थी थे और वह यह वे ये मैं हम आप तुम ने पर कहाँ कहां कौन क्या कब कैसे नहीं
        हूँ हो एक

        은 는 이 가 을 를 의 에 에서 와 과 도 그 그녀 그는 그녀는 나는 저는 어디 누구 무엇 언제
        """
    ).split()
)
# Of scripts without spaces between words; longer ones first. Left out is what also stands in many names.
BLANKLESS = (
    "彼女", "他们", "她们", "我们", "你们", "这是", "那是", "彼", "私", "他", "她", "它", "我", "你", "您", "是",
    "在", "的", "了", "吗", "呢",
)  # fmt: skip
# Yes and no. Left out are "si" and "ne", which are also the signs of elements.
YES_NO = tuple(
    folded(
        """
        yes no ja nein doch oui non sí sì não nee nei nej tak nie ano igen nem да нет так ні evet hayır نعم لا כן לא हाँ
        नहीं 예 네 아니요 아니오 はい いいえ いえ 是 是的 对 不是 不 不对 否 ใช่ ไม่ใช่
        """
    ).split()
)
